"""Attention through torch.nn.attention.flex_attention: masks and soft-caps compiled into one kernel.

B batch, T queries, S keys, H heads, G key/value heads, D head dim.

On a GPU the kernel is compiled at the first call of a shape (some seconds) and skips the blocks of 128
queries by 128 keys that nothing is seen in. PyTorch 2.13 has no backward of it on the CPU, and uncompiled,
as it is run there, it materialises the scores: there it is for tests, by name.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from triptych.kernels.attention.limits import Dropout, needs_gradient
from triptych.kernels.library import without_autocast
from triptych.kernels.segments import segment_ids

BLOCK = 128
SHAPES = 64
"""How many kernels are compiled, one for each shape, window and soft-cap, before PyTorch refuses."""


def by_name_only(device: torch.device) -> bool:
    """On the CPU nobody gains by it."""
    return device.type != "cuda"


def installed(device: torch.device) -> str | None:
    """Why this form cannot run on such a device."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"flex_attention does not run on {device.type}"
    return "it needs Triton" if importlib.util.find_spec("triton") is None else None


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout,
    **_: Any,
) -> str | None:
    """Why this form cannot serve the call."""
    if dropout is not None:
        return "it has no dropout"
    if needs_gradient(mask):
        return "it has no deterministic gradient of the mask"
    if q.device.type != "cuda":
        return "flex_attention has no backward on the CPU" if needs_gradient(q, k, v, sink) else None
    if q.dtype == torch.float64:
        return "its kernels have no double precision"
    if q.shape[1] < 16:
        return f"{q.shape[1]} queries would leave its blocks empty, and each number of keys be compiled anew"
    if min(q.shape[-1], v.shape[-1]) < 16:
        return f"its kernels need head dims of at least 16, q has {q.shape[-1]} and v {v.shape[-1]}"
    return None


def _documents(cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """(B, T) int32, the number of each token's document."""
    return None if cu_seqlens is None else segment_ids(cu_seqlens, *q.shape[:2]).to(q.device)


def blocks_seen(
    length: int,
    keys: int,
    left: int | None,
    right: int | None,
    documents: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(B or 1, query blocks, key blocks) bool, twice: something of the block is seen; all of it is.

    Worked out from each block's first and last token: documents are numbered along a row.
    """

    def ends(tokens: int) -> tuple[Tensor, Tensor]:
        first = torch.arange(0, tokens, BLOCK, device=device)
        return first, (first + BLOCK - 1).clamp(max=tokens - 1)

    (q_first, q_last), (k_first, k_last) = ends(length), ends(keys)
    whole = (q_last - q_first == BLOCK - 1).unsqueeze(1) & (k_last - k_first == BLOCK - 1)
    some = torch.ones_like(whole).unsqueeze(0)
    every = whole.unsqueeze(0)
    if documents is not None:
        d_q_first, d_q_last = (documents[:, x].unsqueeze(2) for x in (q_first, q_last))
        d_k_first, d_k_last = (documents[:, x].unsqueeze(1) for x in (k_first, k_last))
        some = some & (d_k_first <= d_q_last) & (d_k_last >= d_q_first)
        every = every & (d_k_first == d_q_last) & (d_k_last == d_q_first)
    first, last = (x.unsqueeze(1) + keys - length for x in (q_first, q_last))
    if right is not None:
        some, every = some & (k_first <= last + right), every & (k_last <= first + right)
    if left is not None:
        some, every = some & (k_last >= first - left), every & (k_first >= last - left)
    return some, every


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks of each query block are set, and their numbers, those first; (B, 1, ...) int32."""
    numbers = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), numbers.to(torch.int32).unsqueeze(1)


def _block_mask(
    q: Tensor, keys: int, left: int | None, right: int | None, documents: Tensor | None, mask: Tensor | None
) -> BlockMask | None:
    """What hides a key, `mask` where that is bool."""
    if left is None and right is None and documents is None and mask is None:
        return None
    length = q.shape[1]
    offset = keys - length
    some, every = blocks_seen(length, keys, left, right, documents, q.device)

    def seen(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        found = j >= 0
        if right is not None:
            found = found & (j <= t + offset + right)
        if left is not None:
            found = found & (j >= t + offset - left)
        if documents is not None:
            found = found & (documents[b, t] == documents[b, j])
        if mask is not None:
            found = found & mask[b, h, t, j]
        return found

    # A block that counts as full is not masked any more.
    every = every if mask is None else torch.zeros_like(every)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK, mask_mod=seen, seq_lengths=(length, keys)
    )


def _score(softcap: float | None, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """What happens to a score before it is masked."""
    if softcap is None and bias is None:
        return None

    def score(s: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        return s if bias is None else s + bias[b, h, t, j]

    return score


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Every number is a constant: PyTorch 2.13 fails on a soft-cap or scale that it makes a variable at the
    # second value. In one graph, or else too many shapes would silently run uncompiled, with (T, S) scores.
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            return compiled(*args, **kwargs)

    return run


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int | None,
    right: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout,
) -> Tensor:
    """Arguments as in the form "reference"."""
    keys = k.shape[1]
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], keys)
    hides = mask is not None and mask.dtype == torch.bool
    block_mask = _block_mask(q, keys, left, right, _documents(cu_seqlens, q), mask if hides else None)
    run: Callable[..., Any] = flex_attention
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        run = _compiled()
    out, aux = run(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=_score(softcap, None if hides else mask),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=sink is not None),
    )
    if sink is not None:
        # The softmax with the sink is the one without it, times e^lse / (e^lse + e^sink); see `log_sum_exp`.
        share = torch.sigmoid(aux.lse - sink.to(aux.lse.dtype).unsqueeze(-1))
        out = (out * share.unsqueeze(-1)).to(out.dtype)
    result: Tensor = out.transpose(1, 2)
    return result
