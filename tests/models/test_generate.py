import sys

import pytest
import torch

from tests.models.common import random_tokens, small_config, small_model
from triptych import models
from triptych.models.generate import pick


@pytest.mark.parametrize(
    ("pattern", "window"), [("M", None), ("*", None), ("*", 1), ("*", 4), ("MM*", 4), ("M-*-", None)]
)
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 6, 5], [1, 12, 7]])
@torch.no_grad()
def test_logits_with_a_cache_equal_the_parallel_form(pattern, window, pieces):
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": window, "qk_norm": True}
    config = small_config(pattern=pattern, num_layers=4, attention=attention)
    model = small_model(config).eval()
    tokens = random_tokens(config, 3, 20)
    cache = models.Cache()
    logits = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-11)
    assert cache.length == 20
    if window and pattern == "*":
        assert cache.layer(0)["k"].shape[1] == window - 1


def test_greedy_generation_equals_the_parallel_form(monkeypatch):
    config = small_config(num_layers=3)
    model = small_model(config).train()
    prompt = random_tokens(config, 2, 9)
    expected = prompt
    for _ in range(8):
        with torch.no_grad():
            expected = torch.cat([expected, model.eval()(expected)[:, -1:].argmax(-1)], dim=1)
    model.train()
    assert torch.equal(models.generate(model, prompt, 8, temperature=0), expected)
    assert model.training
    monkeypatch.setattr(sys.modules["triptych.models.generate"], "PREFILL_LENGTH", 4)
    assert torch.equal(models.generate(model, prompt, 8, temperature=0), expected)


def test_draws_follow_the_seed():
    config = small_config()
    model = small_model(config)
    prompt = random_tokens(config, 2, 5)
    draws = [models.generate(model, prompt, 12, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_generation_ends_when_every_row_has_made_eos():
    config = small_config()
    model = small_model(config)
    prompt = random_tokens(config, 2, 5)
    free = models.generate(model, prompt, 12, temperature=0)
    eos = int(free[0, 7])
    ended = models.generate(model, prompt, 12, temperature=0, eos=eos)
    stop = [(row[5:] == eos).nonzero() for row in free]
    ends = [5 + int(s[0]) if len(s) else 16 for s in stop]
    assert ended.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(ended[row, : end + 1], free[row, : end + 1])
        assert (ended[row, end + 1 :] == eos).all()


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    """Shares of the tokens that evenly spread quantiles pick."""
    quantiles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    picked = pick(
        logits.expand(1000, -1), quantiles, **{"temperature": 1.0, "top_k": None, "top_p": None} | options
    )
    return picked.bincount(minlength=logits.numel()) / 1000


def test_tokens_are_picked_by_their_probability():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = probs.log()
    for options, expected in [
        ({}, probs),
        ({"temperature": 0.5}, probs**2 / (probs**2).sum()),
        ({"temperature": 0}, torch.tensor([0.0, 1, 0, 0])),
        ({"top_k": 2}, torch.tensor([0, 2 / 3, 0, 1 / 3])),
        ({"top_k": 1}, torch.tensor([0.0, 1, 0, 0])),
        ({"top_k": 9}, probs),
        ({"top_p": 0.5}, torch.tensor([0.0, 1, 0, 0])),
        ({"top_p": 0.6}, torch.tensor([0, 2 / 3, 0, 1 / 3])),
        ({"top_p": 1.0}, probs),
        ({"top_k": 3, "top_p": 0.7}, torch.tensor([0, 2 / 3, 0, 1 / 3])),
    ]:
        torch.testing.assert_close(frequencies(logits, **options), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is negative; use 0"),
        ({"top_k": 0}, "top_k=0 leaves no token; use 1"),
        ({"top_p": 0.0}, "top_p=0.0 is no probability; use a value above 0"),
        ({"top_p": 1.5}, "top_p=1.5 is no probability"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, r"prompts are \(1, 0\); give \(batch, length\)"),
    ],
)
def test_bad_options_are_refused(options, words):
    config = small_config()
    arguments = {"tokens": random_tokens(config, 1, 3), "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=words):
        models.generate(models.build(config), **arguments)
