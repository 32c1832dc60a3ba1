"""Where a token stands: rotary angles along one or several axes, and fixed tables of sines.

Shape legend: B batch, T length, H heads, D channels per head, C hidden size, A axes of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from triptych import kernels

YARN_FAST, YARN_SLOW = 32.0, 1.0
"""Turns within the trained size from which a frequency is kept whole, and up to which it is stretched
whole."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of several axes. frequencies: (A, D / 2A), in radians per token; temperature: a factor
    on the attention scores."""

    frequencies: torch.Tensor
    temperature: float = 1.0


def rotate(x_BTHD: torch.Tensor, positions: torch.Tensor, theta: float, rope: Rope | None) -> torch.Tensor:
    """Queries or keys turned by their positions: (T,) or (B, T) of one axis, or, with `rope`, (B | 1, T, A),
    where axis a turns the a-th of A equal parts of the channels."""
    if rope is None:
        return kernels.rotary(x_BTHD, positions, theta)
    shared = positions.shape[0] == 1
    return kernels.axial_rotary(x_BTHD, positions[0] if shared else positions, frequencies=rope.frequencies)


def axial_rope(
    head_dim: int,
    theta: float,
    grid: tuple[int, ...],
    trained: tuple[int, ...],
    kind: str,
    device: torch.device,
) -> Rope:
    """Frequencies for a grid of tokens that may be larger than the trained one, each axis by its own factor
    s = max(1, size / trained).

    none: theta^(-2i/d), d = head_dim / A. ntk: theta becomes theta s^(d / (d - 2)), so that the lowest
    frequency is stretched by s and the highest kept. yarn: a frequency that turns fewer than YARN_SLOW times
    within the trained size is divided by s, one of more than YARN_FAST turns is kept, in between both are
    mixed; scores get the factor (0.1 ln s + 1)² (arXiv 2309.00071, section 3), s of the largest axis.
    """
    size = head_dim // len(grid)
    factors = [max(1.0, now / before) for now, before in zip(grid, trained)]
    frequencies = []
    for factor, before in zip(factors, trained):
        base = theta * factor ** (size / max(size - 2, 1)) if kind == "ntk" else theta
        exponents = torch.arange(size // 2, device=device, dtype=torch.float64) * (-2.0 / size)
        frequency = base**exponents
        if kind == "yarn":
            turns = before * frequency / (2 * math.pi)
            kept = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
            frequency = frequency * kept + frequency / factor * (1 - kept)
        frequencies.append(frequency)
    temperature = (0.1 * math.log(max(factors)) + 1) ** 2 if kind == "yarn" else 1.0
    return Rope(torch.stack(frequencies), temperature)


def grid_positions(grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 (1, T, A): the coordinates of each token, in raster order."""
    axes = [torch.arange(size, device=device) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2).unsqueeze(0)


def sincos(positions_BTA: torch.Tensor, channels: int) -> torch.Tensor:
    """float64 (B, T, C): sines and cosines of each coordinate, C / A channels per axis, the last axis first,
    at frequencies 10000^(-i / (C / 2A)) (DiT, arXiv 2212.09748; MAE, arXiv 2111.06377)."""
    axes = positions_BTA.shape[-1]
    half = channels // axes // 2
    exponents = torch.arange(half, device=positions_BTA.device, dtype=torch.float64) / -half
    angles = positions_BTA.flip(-1).double().unsqueeze(-1) * 10000.0**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
