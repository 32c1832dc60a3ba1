"""The chunked mLSTM as plain functions on tensors, forward and backward: what the custom ops run.

B batch, T length, L chunk size, C chunks in a row, K = B*C chunks in all, H heads, D channels of queries and
keys, E channels of values. The equations are at the head of chunks.py.

y = u / max(|n|, 1) with n the last entry of u, both divided by exp(m). As y does not depend on m, backward
takes every m as constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.mlstm.chunks import Chunks, chunked, cut
from triptych.kernels.mlstm.reference import NOTHING


class Outputs(NamedTuple):
    """y (B, T, H, E), the final memory (B, H, D, E + 1) and m (B, H); for backward the normaliser n (B, T, H)
    and the memory before each chunk (B, C, H, D, E + 1)."""

    y: Tensor
    final_memory: Tensor
    final_m: Tensor
    normaliser: Tensor
    memories: Tensor


class Gradients(NamedTuple):
    """Of q, k, v, igate, fgate (B, T, H, ...) and the initial memory (B, H, D, E + 1)."""

    q: Tensor
    k: Tensor
    v: Tensor
    igate: Tensor
    fgate: Tensor
    initial: Tensor


def _joined(values: Tensor, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """(K, H, L, ...) as (B, T, H, ...) contiguous, without the padding."""
    values = values.transpose(1, 2)
    return values.reshape(batch, -1, *values.shape[2:])[:, :length].to(dtype).contiguous()


def _first(s: Chunks, batch: int, m: Tensor | None) -> Tensor:
    """m (B, H) of the initial state."""
    return s.q.new_full((batch, s.q.shape[1]), NOTHING) if m is None else m.to(s.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    memory: Tensor | None,
    m: Tensor | None,
    segments: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Outputs:
    """memory, m: the initial state."""
    s = cut(q, k, v, igate, fgate, segments, scale, chunk_size)
    batch, length = q.shape[:2]
    ms, final_m, keep, entering = s.scales(_first(s, batch, m))
    added = s.mm((s.k * entering.unsqueeze(-1)).transpose(2, 3), s.v)
    added = added.view(*ms.shape, *added.shape[2:])  # (B, C, H, D, E + 1)
    memories = torch.empty_like(added)
    memories[:, 0] = 0.0 if memory is None else memory
    keep = keep[..., None, None]
    for c in range(memories.shape[1] - 1):
        torch.addcmul(added[:, c], memories[:, c], keep[:, c], out=memories[:, c + 1])
    final_memory = torch.addcmul(added[:, -1], memories[:, -1], keep[:, -1])
    y, normaliser = s.q.new_empty(*s.v.shape[:3], v.shape[3]), s.q.new_empty(s.v.shape[:3])
    top, carried = s.tops(ms)
    for tile in s.tiles():
        scores = s.mm(s.q[tile], s.k[tile].transpose(2, 3)).mul_(s.weights(tile, top))
        u = s.mm(scores, s.v[tile])
        u += s.mm(s.q[tile] * carried[tile].unsqueeze(-1), memories.flatten(0, 1)[tile])
        normaliser[tile] = u[..., -1]
        torch.div(u[..., :-1], s.denominators(u[..., -1], tile, top).unsqueeze(-1), out=y[tile])
    normaliser = _joined(normaliser, batch, length, s.dtype)
    return Outputs(_joined(y, batch, length, v.dtype), final_memory, final_m, normaliser, memories)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    m: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    normaliser: Tensor,
    memories: Tensor,
    scale: float,
    chunk_size: int,
) -> Gradients:
    """From the gradients of y and of the final memory, with what forward gave."""
    s = cut(q, k, v, igate, fgate, segments, scale, chunk_size)
    batch, length = q.shape[:2]
    ms, _, keep, entering = s.scales(_first(s, batch, m))
    top, carried = s.tops(ms)
    size = s.b.shape[2]
    du = _of_sums(s, top, *(chunked(x, size).to(s.dtype) for x in (dy, y, normaliser)))
    from_outputs = s.mm((s.q * carried.unsqueeze(-1)).transpose(2, 3), du).view(memories.shape)
    dmemories = torch.empty_like(memories)  # of the memory after each chunk
    dmemories[:, -1] = 0.0 if dfinal is None else dfinal
    factor = keep[..., None, None]
    for c in reversed(range(1, memories.shape[1])):
        torch.addcmul(from_outputs[:, c], dmemories[:, c], factor[:, c], out=dmemories[:, c - 1])
    initial = torch.addcmul(from_outputs[:, 0], dmemories[:, 0], factor[:, 0])
    before, after = memories.flatten(0, 1), dmemories.flatten(0, 1)
    dq = s.mm(du, before.transpose(2, 3)).mul_(carried.unsqueeze(-1))
    dk = s.mm(s.v, after.transpose(2, 3)).mul_(entering.unsqueeze(-1))
    dv = s.mm(s.k * entering.unsqueeze(-1), after)
    # A log forget gate at t weighs what passes from tokens before t to t and later: from the memory before
    # the chunk to tokens, from tokens to the memory behind it, through all of it, and between tokens.
    kept = (before * after).sum((-1, -2)) * keep.flatten(0, 1)
    to_end, through = _dot(s.k, dk), _dot(s.q, dq)
    dlog_i = to_end.clone()
    for tile in s.tiles():
        weights = s.weights(tile, top)
        products = s.mm(s.q[tile], s.k[tile].transpose(2, 3))
        dv[tile] += s.mm((products * weights).transpose(2, 3), du[tile])
        dproducts = s.mm(du[tile], s.v[tile].transpose(2, 3)).mul_(weights)
        dq[tile] += s.mm(dproducts, s.k[tile])
        dk[tile] += s.mm(dproducts.transpose(2, 3), s.q[tile])
        between = products.mul_(dproducts)
        dlog_i[tile] += between.sum(-2, dtype=torch.float64)
        # Rows less columns; on the diagonal they cancel, exactly only if left out.
        between.diagonal(dim1=-2, dim2=-1).zero_()
        through[tile] += between.sum(-1, dtype=torch.float64).sub_(between.sum(-2, dtype=torch.float64))
    dlog_f = through.flip(-1).cumsum(-1).flip(-1) + kept.unsqueeze(-1)
    dlog_f[..., 1:] += to_end.cumsum(-1)[..., :-1]
    dfgate = _joined(dlog_f, batch, length, s.dtype) * torch.sigmoid(-fgate.to(s.dtype))
    return Gradients(
        _joined(dq * scale, batch, length, q.dtype),
        _joined(dk, batch, length, k.dtype),
        _joined(dv[..., :-1], batch, length, v.dtype),
        _joined(dlog_i, batch, length, igate.dtype),
        dfgate.to(fgate.dtype),
        initial,
    )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Over channels, in fp64: what a token adds here and takes away there must cancel in sums over tokens."""
    return (x * y).sum(-1, dtype=torch.float64)


def _of_sums(s: Chunks, top: Tensor, dy: Tensor, y: Tensor, normaliser: Tensor) -> Tensor:
    """Gradient of u, (K, H, L, E + 1), from that of y = u / max(|n|, exp(-m))."""
    denominator = s.denominators(normaliser, slice(None), top)
    du = dy / denominator.unsqueeze(-1)
    sign = torch.sign(normaliser) * (normaliser.abs() == denominator)
    return torch.cat([du, -((du * y).sum(-1) * sign).unsqueeze(-1)], dim=-1)
