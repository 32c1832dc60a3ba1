"""The SSD recurrence, a token at a time.

B batch, T length, H heads, P head dim, G groups, N state, docs packed documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) and the last state (B, H, P, N); b and c already hold one row per head."""
    # unbind and stack: indexing x[:, t] would make backward quadratic in T.
    ys = []
    for x_t, dt_t, b_t, c_t in zip(x.unbind(1), dt.unbind(1), b.unbind(1), c.unbind(1)):
        decay = torch.exp(dt_t * a)[..., None, None]
        state = decay * state + (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1) * b_t.unsqueeze(-2)
        ys.append((state * c_t.unsqueeze(-2)).sum(-1))
    return torch.stack(ys, 1), state


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """Mamba-2's step sizes: bias, softplus (the identity above 20) and clamp."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = torch.where(dt > 20, dt, torch.log1p(torch.exp(dt.clamp(max=20))))
    return dt if limit == (0.0, float("inf")) else dt.clamp(*limit)


def _rotate(values: Tensor, turn: Tensor) -> Tensor:
    """Pairs (i, i + N/2) as complex numbers, times e^(i angle)."""
    turned = torch.complex(*values.chunk(2, dim=-1)) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def ssd(
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
    dt_limit: tuple[float, float],
    angles: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    dtype = statistics_dtype(x, dt, a)
    batch, length, heads, _ = x.shape
    repeats = heads // b.shape[2]
    dt = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    if angles is not None:
        turn = torch.polar(torch.ones_like(angles, dtype=dtype), angles.to(dtype))
        b, c = (_rotate(y.to(dtype), turn) for y in (b, c))
    inputs = (x, dt, *(y.repeat_interleave(repeats, dim=2) for y in (b, c)))
    flat_x, flat_dt, flat_b, flat_c = (y.to(dtype).flatten(0, 1) for y in inputs)
    bounds = (
        [(i * length, (i + 1) * length) for i in range(batch)]
        if cu_seqlens is None
        else document_bounds(cu_seqlens)
    )
    ys, states = [], []
    for i, (start, end) in enumerate(bounds):
        state = x.new_zeros(*x.shape[2:], b.shape[3]) if initial_state is None else initial_state[i]
        part = [y[start:end].unsqueeze(0) for y in (flat_x, flat_dt, flat_b, flat_c)]
        y, state = _scan(part[0], part[1], a.to(dtype), part[2], part[3], state.to(dtype).unsqueeze(0))
        ys.append(y[0])
        states.append(state[0])
    y = torch.cat(ys).view(x.shape)
    if d is not None:
        y = y + d.to(dtype).unsqueeze(-1) * x.to(dtype)
    if z is not None:
        y = y * z.to(dtype) * torch.sigmoid(z.to(dtype))
    return y.to(x.dtype), torch.stack(states) if with_final_state else None
