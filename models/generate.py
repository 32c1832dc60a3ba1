"""Generation, one token after the other, from a cache of keys, values and states.

Shape legend: B batch, T prompt length, V vocabulary.
"""

from __future__ import annotations

import torch

from triptych.kernels import hash_uniform, string_key
from triptych.models.cache import Cache
from triptych.models.lm import LanguageModel

PREFILL_LENGTH = 512
"""Tokens of a prompt that are read at once."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | None = None,
) -> torch.Tensor:
    """Prompts (B, T) -> (B, T + new), new <= max_new_tokens.

    temperature: 0 takes the likeliest token. top_k: among the k likeliest only. top_p: among the likeliest
    whose probabilities reach p together (arXiv 1904.09751). eos: a row that has made it is filled up with it,
    and generation ends when all rows have. Draws are a function of (seed, row, position).
    Raises ValueError for options out of range or an empty prompt.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    try:
        cache = Cache()
        fresh = tokens
        done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits_BV = _last_logits(model, fresh, cache)
            uniform = _uniform(seed, cache.length, tokens)
            token = pick(logits_BV, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
            if eos is not None:
                token = token.masked_fill(done, eos)
                done = done | (token == eos)
            fresh = token.unsqueeze(1).to(tokens.dtype)
            tokens = torch.cat([tokens, fresh], dim=1)
            if eos is not None and bool(done.all()):
                break
    finally:
        model.train(was_training)
    return tokens


def _last_logits(model: LanguageModel, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits (B, V) after the tokens; those between are never held all at once."""
    for part in tokens.split(PREFILL_LENGTH, dim=1):
        logits_BTV = model(part, cache=cache)
    return logits_BTV[:, -1]


def pick(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> torch.Tensor:
    """Tokens (B,) at the quantiles uniform_B of the distribution that the options leave."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    sorted_BV, order_BV = logits_BV.double().div(temperature).sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    if top_k is not None:
        probs_BV[:, top_k:] = 0
    if top_p is not None:
        before_BV = probs_BV.cumsum(dim=-1) - probs_BV
        probs_BV = probs_BV.masked_fill(before_BV >= top_p * probs_BV.sum(dim=-1, keepdim=True), 0)
    cumulative_BV = probs_BV.cumsum(dim=-1)
    below_BV = cumulative_BV <= uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    last_B = (probs_BV > 0).sum(dim=-1) - 1
    place_B = torch.minimum(below_BV.sum(dim=-1), last_B)
    return order_BV.gather(1, place_B.unsqueeze(1)).squeeze(1)


def _uniform(seed: int, position: int, tokens: torch.Tensor) -> torch.Tensor:
    """One number in (0, 1) per row."""
    rows = torch.arange(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    return hash_uniform(string_key(seed, f"generate.{position}"), rows)


def _check(
    tokens: torch.Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"prompts are {tuple(tokens.shape)}; give (batch, length) with one token at least")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative; use 0 or more")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; use 0 for the likeliest token, or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} leaves no token; use 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is no probability; use a value above 0 and up to 1")
