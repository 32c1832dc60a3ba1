"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _random(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Weight and bias, a row length that is no power of two."""
    x, weight, bias = _random(device, dtype, (2, 35, 200), (200,), (200,))
    return {"x": 2 + x, "weight": weight, "bias": bias}


def bare(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Neither weight nor bias."""
    return {"x": _random(device, dtype, (2, 35, 128))[0]}


def _modulated(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    x, shift, scale = _random(device, dtype, (3, 35, 72), shape, shape)
    return {"x": 2 + x, "shift": shift, "scale": scale}


def per_row(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One modulation per row."""
    return _modulated(device, dtype, (3, 1, 72))


def per_token(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One modulation per token."""
    return _modulated(device, dtype, (3, 35, 72))


MAKERS = {"plain": plain, "bare": bare}
MODULATED_MAKERS = {"plain": per_row, "per token": per_token}
