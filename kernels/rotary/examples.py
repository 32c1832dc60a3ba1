"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _x(device: torch.device, dtype: torch.dtype, dim: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(2, 70, 3, dim, generator=generator).to(device, dtype)


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Positions that all rows have in common."""
    return {"x": _x(device, dtype, 16), "positions": torch.arange(70, device=device)}


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Positions of each row, given frequencies, a head size that is no power of two."""
    positions = torch.stack([torch.arange(70), torch.arange(70) % 31]).to(device)
    frequencies = torch.linspace(1.0, 0.01, 6, device=device)
    return {"x": _x(device, dtype, 12), "positions": positions, "frequencies": frequencies}


def grid(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """7 rows of 10 tokens."""
    positions = torch.stack([torch.arange(70) // 10, torch.arange(70) % 10], dim=-1)
    return {"x": _x(device, dtype, 16), "positions": positions.to(device)}


def grids(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A grid of its own per row, given frequencies, a head size that is no power of two."""
    first, second = (torch.stack([torch.arange(70) // w, torch.arange(70) % w], dim=-1) for w in (10, 14))
    frequencies = torch.stack([torch.linspace(1.0, 0.1, 3), torch.linspace(0.5, 0.2, 3)]).to(device)
    positions = torch.stack([first, second]).to(device)
    return {"x": _x(device, dtype, 12), "positions": positions, "frequencies": frequencies}


MAKERS = {"plain": plain, "packed": packed}
AXIAL_MAKERS = {"plain": grid, "packed": grids}
