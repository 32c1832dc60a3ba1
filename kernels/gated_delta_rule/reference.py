"""The gated delta rule, a token at a time.

B batch, T length, H heads, D channels of queries and keys, E channels of values, docs packed documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds

EPS = 1e-6
"""Added to the sum of squares under the root where queries and keys are normalised, as others do."""


def unit(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + EPS), over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, E) and the last state (B, H, D, E), all of one dtype."""
    ys = []
    # unbind and stack: indexing q[:, t] would make backward quadratic in T.
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(1) for x in (q, k, v, g, beta))):
        state = g_t.exp()[..., None, None] * state
        recalled = (k_t.unsqueeze(-1) * state).sum(-2)
        written = beta_t.unsqueeze(-1) * (v_t - recalled)
        state = state + k_t.unsqueeze(-1) * written.unsqueeze(-2)
        ys.append(scale * (q_t.unsqueeze(-1) * state).sum(-2))
    return torch.stack(ys, 1), state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    normalize: bool,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    dtype = statistics_dtype(q, v, g, beta)
    batch, length, heads, channels = q.shape
    q, k = (unit(x.to(dtype)) if normalize else x.to(dtype) for x in (q, k))
    g = q.new_zeros(batch, length, heads) if g is None else g
    flat = [x.to(dtype).flatten(0, 1) for x in (q, k, v, g, beta)]
    bounds = (
        [(i * length, (i + 1) * length) for i in range(batch)]
        if cu_seqlens is None
        else document_bounds(cu_seqlens)
    )
    ys, states = [], []
    for i, (start, end) in enumerate(bounds):
        state = (
            q.new_zeros(heads, channels, v.shape[3]) if initial_state is None else initial_state[i].to(dtype)
        )
        y, state = scan(*(x[None, start:end] for x in flat), scale=scale, state=state.unsqueeze(0))
        ys.append(y[0])
        states.append(state)
    return torch.cat(ys).view(v.shape).to(v.dtype), torch.cat(states) if with_final_state else None
