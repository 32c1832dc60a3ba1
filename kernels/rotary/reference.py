"""Rotary positions, a pair of channels at a time. B batch, T length, H heads, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def rotary(x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None = None) -> Tensor:
    """Channel i is paired with i + D/2; shapes as in the public function."""
    dtype = statistics_dtype(x)
    half = x.shape[-1] // 2
    positions = positions.to(dtype).expand(x.shape[:2])
    out = torch.empty_like(x, dtype=dtype)
    for i in range(half):
        frequency = theta ** (-2 * i / x.shape[-1]) if frequencies is None else frequencies[i].to(dtype)
        angle = (positions * frequency).unsqueeze(-1)  # (B, T, 1)
        first, second = x[..., i].to(dtype), x[..., i + half].to(dtype)
        out[..., i] = first * angle.cos() - second * angle.sin()
        out[..., i + half] = second * angle.cos() + first * angle.sin()
    return out.to(x.dtype)
