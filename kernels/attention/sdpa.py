"""Attention through PyTorch's scaled_dot_product_attention, itself a registered operator with a fused form.

B batch, T queries, S keys, H heads, G key/value heads, D head dim. Packed documents of one length form a
batch. A window is cut into blocks of queries with the keys they may see, a batch of small attentions, so that
its cost grows as T and no (T, S) mask is made. A sink is exact through `log_sum_exp`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.attention import log_sum_exp
from triptych.kernels.attention.limits import Dropout, needs_gradient
from triptych.kernels.attention.masks import all_visible, clip, row_may_be_empty
from triptych.kernels.library import without_autocast
from triptych.kernels.segments import document_bounds

SMALLEST_BLOCK = 64
"""Queries of a window's block at least: below, the fused kernels' own blocks would be partly empty."""


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sink: Tensor | None,
    mask: Tensor | None,
    causal: bool = False,
) -> Tensor:
    """(B, H, T, D) in and out; mask broadcasts to (B, H, T, S)."""
    if sink is not None:
        return log_sum_exp.attention_with_sink(q, k, v, sink, mask, causal, scale)
    if q.device.type == "meta":
        # PyTorch would take the form with materialised scores; count and save as the fused one does.
        return log_sum_exp.flash_cpu(q, k, v, 0.0, causal, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
    sink: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """One batch of equal lengths, (B, T, H, D) in and out."""
    length, keys = q.shape[1], k.shape[1]
    left, right = clip(left, right, length, keys)
    square = length == keys
    plain = mask is None and cu_seqlens is None
    on_meta = q.device.type == "meta"
    if plain and square and not on_meta and left is not None and right is not None:
        block = max(left + right, SMALLEST_BLOCK)
        if 2 * (block + left + right) <= length:
            return _windowed(q, k, v, left, right, block, scale, sink)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if (plain and square and left is None and right == 0) or on_meta:
        return _fused(q, k, v, scale, sink, None, causal=right == 0).transpose(1, 2)
    seen = all_visible(length, keys, left, right, cu_seqlens, mask, q.shape[0], q.device)
    if not row_may_be_empty(length, keys, right, mask):
        return _fused(q, k, v, scale, sink, seen).transpose(1, 2)
    assert seen is not None
    # What a fused kernel gives for a row without keys is its own affair: let such a row see all, and drop it.
    is_bool = seen.dtype == torch.bool
    some = (seen if is_bool else seen > -torch.inf).any(-1, keepdim=True)
    seen = seen | ~some if is_bool else seen.masked_fill(~some, 0.0)
    return _fused(q, k, v, scale, sink, seen).masked_fill(~some, 0.0).transpose(1, 2)


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, block: int, scale: float, sink: Tensor | None
) -> Tensor:
    """Blocks of `block` >= left, right queries, each with its keys, `left` before and `right` after them."""
    batch, length = q.shape[:2]
    pad = -length % block
    blocks = (length + pad) // block

    def cut(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, block))

    def with_neighbours(x: Tensor) -> Tensor:
        x = cut(x)
        before = F.pad(x[:, :-1, block - left :], (0, 0, 0, 0, 0, 0, 1, 0))
        after = F.pad(x[:, 1:, :right], (0, 0, 0, 0, 0, 0, 0, 1))
        return torch.cat([before, x, after], dim=2).flatten(0, 1).transpose(1, 2)

    # Padding sees padding, so that no row is empty; nothing else sees it.
    first = torch.arange(blocks, device=q.device).view(-1, 1, 1) * block
    query = first + torch.arange(block, device=q.device).unsqueeze(1)
    key = first + torch.arange(-left, block + right, device=q.device)
    seen = (key >= query - left) & (key <= query + right) & (key >= 0) & ((key < length) | (query >= length))
    seen = seen.repeat(batch, 1, 1).unsqueeze(1)
    out = _fused(
        cut(q).flatten(0, 1).transpose(1, 2), with_neighbours(k), with_neighbours(v), scale, sink, seen
    )
    return out.transpose(1, 2).reshape(batch, length + pad, *out.shape[1::2])[:, :length]


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
    sink: Tensor | None,
    cu_seqlens: Tensor,
) -> Tensor:
    """Sort documents by length, attend within each batch of one length, and put the tokens back."""
    starts_of: dict[int, list[int]] = {}
    for start, end in document_bounds(cu_seqlens):
        starts_of.setdefault(end - start, []).append(start)
    q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
    if len(starts_of) == 1:
        (length,) = starts_of
        q_, k_, v_ = (x.unflatten(0, (-1, length)) for x in (q_, k_, v_))
        return _attend(q_, k_, v_, left, right, scale, sink).reshape(*q.shape[:3], -1)
    order = torch.cat(
        [(torch.tensor(s).unsqueeze(1) + torch.arange(n)).flatten() for n, s in starts_of.items()]
    )
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    order, back = order.to(q.device), back.to(q.device)
    sizes = [n * len(starts) for n, starts in starts_of.items()]
    parts = zip(*(x.index_select(0, order).split(sizes) for x in (q_, k_, v_)))
    outs = [
        _attend(*(x.unflatten(0, (-1, n)) for x in part), left, right, scale, sink).flatten(0, 1)  # type: ignore[call-arg]
        for n, part in zip(starts_of, parts)
    ]
    return torch.cat(outs).index_select(0, back).view(*q.shape[:3], -1)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout,
    **_: Any,
) -> str | None:
    """Why this form cannot serve the call."""
    if dropout is not None:
        return "its dropout would draw from the device's generator, not from the sample keys"
    if softcap is not None:
        return "scaled_dot_product_attention has no softcap"
    if sink is not None:
        if q.device.type not in ("cpu", "meta"):
            return "scaled_dot_product_attention does not give the log-sum-exp that a sink needs"
        if needs_gradient(mask):
            return "beside a sink it has no gradient of the mask"
        if q.shape[-1] != v.shape[-1]:
            return f"a sink needs one head dim, q has {q.shape[-1]} and v {v.shape[-1]}"
    return None


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
    # A traced tensor has no values to sort documents by: there they are hidden by a mask.
    readable = q.device.type != "meta" and not torch.compiler.is_compiling()
    if cu_seqlens is not None and mask is None and readable:
        return _packed(q, k, v, left, right, scale, sink, cu_seqlens)
    return _attend(q, k, v, left, right, scale, sink, mask, cu_seqlens)
