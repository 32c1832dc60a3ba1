"""WKV of RWKV-6, a token at a time.

B batch, T length, H heads, D key dim, E value dim, docs packed documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


def _sweep(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What each token reads of the tokens before it, (T, H, E), and the last state; inputs (T, H, .)."""
    reads = []
    # unbind and stack: indexing x[t] would make backward quadratic in T.
    for r_t, k_t, v_t, w_t in zip(*(x.unbind(0) for x in (r, k, v, w))):
        reads.append((state * r_t.unsqueeze(-1)).sum(-2))
        state = w_t.exp().unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
    return torch.stack(reads), state


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool,
    scale: float,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    dtype = statistics_dtype(r, k, v, w)
    batch, length, heads, dim = r.shape
    tokens = [x.to(dtype).flatten(0, 1) for x in (r, k, v, w)]
    rows = [(i * length, (i + 1) * length) for i in range(batch)]
    ys, states = [], []
    for i, (start, end) in enumerate(rows if cu_seqlens is None else document_bounds(cu_seqlens)):
        r_, k_, v_, w_ = (x[start:end] for x in tokens)
        empty = r_.new_zeros(heads, dim, v.shape[3])
        reads, state = _sweep(r_, k_, v_, w_, empty if initial_state is None else initial_state[i].to(dtype))
        if bidirectional:
            back, _ = _sweep(r_.flip(0), k_.flip(0), v_.flip(0), w_.flip(0), empty)
            reads = reads + back.flip(0)
        own = (r_ * u.to(dtype) * k_).sum(-1, keepdim=True) * v_
        ys.append(scale * (reads + own))
        states.append(state)
    return torch.cat(ys).view(v.shape).to(v.dtype), torch.stack(states) if return_final_state else None
