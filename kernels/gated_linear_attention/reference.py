"""Gated linear attention, a token at a time.

B batch, T length, H heads, D key dim, E value dim, docs packed documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    dtype = statistics_dtype(q, k, v, g)
    batch, length, heads, dim = q.shape
    log_decay = g.expand(batch, length, heads) if g.dim() == 1 else g
    log_decay = log_decay if g.dim() == 4 else log_decay.unsqueeze(-1)  # (B, T, H, D | 1)
    tokens = [x.to(dtype).flatten(0, 1) for x in (q, k, v, log_decay)]
    rows = [(i * length, (i + 1) * length) for i in range(batch)]
    ys, states = [], []
    for i, (start, end) in enumerate(rows if cu_seqlens is None else document_bounds(cu_seqlens)):
        state = q.new_zeros(heads, dim, v.shape[3]) if initial_state is None else initial_state[i]
        state = state.to(dtype)
        # unbind and stack: indexing x[t] would make backward quadratic in T.
        for q_t, k_t, v_t, g_t in zip(*(x[start:end].unbind(0) for x in tokens)):
            state = g_t.exp().unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
            ys.append(scale * (state * q_t.unsqueeze(-1)).sum(-2))
        states.append(state)
    y = torch.stack(ys).view(v.shape).to(v.dtype)
    return y, torch.stack(states) if return_final_state else None
