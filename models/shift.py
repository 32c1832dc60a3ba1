"""Token shift of Vision-RWKV (arXiv 2403.02308, section 3.2): a layer's input mixed with its neighbours.

Shape legend: B batch, T length, C channels, A axes of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from triptych.models.config import ModelConfig
from triptych.models.context import Context


def shift_axes(config: ModelConfig) -> int:
    """Along how many axes inputs are shifted; 0: not at all."""
    return len(getattr(config, "input_size", ())) if config.wkv.shift == "quad" else 0


def check_shift(config: ModelConfig, user: str) -> None:
    """Raises ValueError, naming the user, where there is no grid on which tokens have neighbours."""
    if config.wkv.shift == "quad" and not shift_axes(config):
        raise ValueError(
            f"model.wkv.shift=quad gives {user} the neighbours of a token on a grid, and "
            f"model.family={config.family} has none; use model.wkv.shift=none, or leave {user} out"
        )


def shifted(x_BTC: torch.Tensor, context: Context, axes: int) -> torch.Tensor:
    """(B, T, C) with 1/(2 A) of the channels taken from each neighbour: for images the first quarter from the
    left, then right, above, below. Zeros where there is none; channels left over stay where they are."""
    if axes == 0:
        return x_BTC
    assert context.scan is not None, "images have a scan"
    size = x_BTC.shape[-1] // (2 * axes)
    *parts, rest = x_BTC.split([*[size] * 2 * axes, x_BTC.shape[-1] - 2 * axes * size], dim=-1)
    offsets = [
        tuple(step if axis == along else 0 for axis in range(axes))
        for along in reversed(range(axes))
        for step in (-1, 1)
    ]
    return torch.cat([*map(context.scan.neighbour, parts, offsets), rest], dim=-1)


def mix(x_BTC: torch.Tensor, shifted_BTC: torch.Tensor, mu_C: torch.Tensor) -> torch.Tensor:
    """mu x + (1 - mu) shifted."""
    return torch.lerp(shifted_BTC, x_BTC, mu_C.to(x_BTC.dtype))


@dataclass(frozen=True)
class Ramp:
    """low + span (i / count)^exponent for element i."""

    count: int
    exponent: float
    low: float = 0.0
    span: float = 1.0

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return self.low + self.span * (index.double() / self.count) ** self.exponent


@dataclass(frozen=True)
class Zigzag:
    """log 0.3, plus 0, 1/2, -1/2 in turn: spatial_first."""

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return math.log(0.3) + 0.5 * ((index + 1) % 3 - 1).double()
