"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch


def _of(device: torch.device, dtype: torch.dtype, gate: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = {"x": (3, 35, 72), "y": (3, 35, 72), "gate": gate}
    return {name: torch.randn(s, generator=generator).to(device, dtype) for name, s in shapes.items()}


def per_row(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One gate per row."""
    return _of(device, dtype, (3, 1, 72))


def per_token(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One gate per token."""
    return _of(device, dtype, (3, 35, 72))


MAKERS = {"plain": per_row, "per token": per_token}
