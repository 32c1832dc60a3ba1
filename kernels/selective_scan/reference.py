"""The selective scan, a token at a time.

B batch, T length, D channels, N state per channel, docs packed documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One document: x, dt (T, D), a (D, N), b, c (T, N), state (D, N) -> y (T, D) and the last state."""
    # unbind and stack: indexing x[t] would make backward quadratic in T.
    ys = []
    for x_t, dt_t, b_t, c_t in zip(x.unbind(0), dt.unbind(0), b.unbind(0), c.unbind(0)):
        state = torch.exp(dt_t.unsqueeze(-1) * a) * state + (dt_t * x_t).unsqueeze(-1) * b_t
        ys.append((state * c_t).sum(-1))
    return torch.stack(ys), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    dtype = statistics_dtype(x, dt, a)
    batch, length, channels = x.shape
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = F.softplus(step) if dt_softplus else step
    flat_x, flat_dt, flat_b, flat_c = (v.to(dtype).flatten(0, 1) for v in (x, step, b, c))
    bounds = (
        [(i * length, (i + 1) * length) for i in range(batch)]
        if cu_seqlens is None
        else document_bounds(cu_seqlens)
    )
    ys, states = [], []
    for i, (start, end) in enumerate(bounds):
        state = flat_x.new_zeros(channels, a.shape[1]) if initial_state is None else initial_state[i]
        part = [v[start:end] for v in (flat_x, flat_dt, flat_b, flat_c)]
        y, state = _scan(part[0], part[1], a.to(dtype), part[2], part[3], state.to(dtype))
        ys.append(y)
        states.append(state)
    y = torch.cat(ys).view(x.shape)
    if d is not None:
        y = y + d.to(dtype) * x.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), torch.stack(states) if with_final_state else None
