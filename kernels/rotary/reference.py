"""Rotary positions, a pair of channels at a time. B batch, T length, H heads, D head dim, A axes."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def rotary(x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None) -> Tensor:
    """x (B, T, H, D). positions: (T, A) or (B, T, A). frequencies: (A, D/2A) or None. Axis a turns the a-th
    of A equal parts of the channels; within a part of size S, channel i is paired with i + S/2."""
    dtype = statistics_dtype(x)
    axes = positions.shape[-1]
    size = x.shape[-1] // axes
    positions = positions.to(dtype).expand(*x.shape[:2], axes)
    out = torch.empty_like(x, dtype=dtype)
    for axis in range(axes):
        for i in range(size // 2):
            frequency = theta ** (-2 * i / size) if frequencies is None else frequencies[axis, i].to(dtype)
            angle = (positions[..., axis] * frequency).unsqueeze(-1)  # (B, T, 1)
            at, other = axis * size + i, axis * size + i + size // 2
            first, second = x[..., at].to(dtype), x[..., other].to(dtype)
            out[..., at] = first * angle.cos() - second * angle.sin()
            out[..., other] = second * angle.cos() + first * angle.sin()
    return out.to(x.dtype)
