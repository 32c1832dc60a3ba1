"""WKV as its formula reads, every token with every other.

T length of a document, C channels, docs packed documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


def _document(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, bidirectional: bool
) -> tuple[Tensor, Tensor | None]:
    """k, v (T, C), w per step and u (C,), state (2, C) -> y (T, C), and the final state if causal."""
    length = k.shape[0]
    t = torch.arange(length, device=k.device)
    distance = (t.unsqueeze(1) - t).abs().unsqueeze(-1)
    log_weights = k - (distance - 1) * w  # (T outputs, T inputs, C)
    log_weights = torch.where(distance == 0, u + k, log_weights)
    if bidirectional:
        return (log_weights.softmax(1) * v).sum(1), None
    hidden = t > t.unsqueeze(1)
    log_weights = log_weights.masked_fill(hidden.unsqueeze(-1), float("-inf"))
    last = k - (length - 1 - t).unsqueeze(-1) * w
    if state is not None:
        # All that came before acts as one more token, just ahead of the first.
        mean, log_weight = state
        v = torch.cat([mean.unsqueeze(0), v])
        log_weights = torch.cat([(log_weight - t.unsqueeze(-1) * w).unsqueeze(1), log_weights], 1)
        last = torch.cat([(log_weight - length * w).unsqueeze(0), last])
    final_state = torch.stack([(last.softmax(0) * v).sum(0), last.logsumexp(0)])
    return (log_weights.softmax(1) * v).sum(1), final_state


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool,
    divide_u: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    dtype = statistics_dtype(k, v, w)
    batch, length, _ = k.shape
    flat_k, flat_v = k.to(dtype).flatten(0, 1), v.to(dtype).flatten(0, 1)
    w, u = w.to(dtype), u.to(dtype)
    bounds = (
        [(i * length, (i + 1) * length) for i in range(batch)]
        if cu_seqlens is None
        else document_bounds(cu_seqlens)
    )
    ys, states = [], []
    for i, (start, end) in enumerate(bounds):
        tokens = end - start if bidirectional else 1
        state = None if initial_state is None else initial_state[i].to(dtype)
        first = u / tokens if divide_u else u
        y, state = _document(flat_k[start:end], flat_v[start:end], w / tokens, first, state, bidirectional)
        ys.append(y)
        states.append(state)
    y = torch.cat(ys).view(v.shape).to(v.dtype)
    return y, torch.stack([s for s in states if s is not None]) if with_final_state else None
