"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _random(device: torch.device, dtype: torch.dtype, count: int, channels: int) -> tuple[Tensor, ...]:
    """`count` tensors (2, 35, channels), then a weight."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = [(2, 35, channels)] * count + [(channels,)]
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A row length that is no power of two."""
    x, weight = _random(device, dtype, 1, 200)
    return {"x": x, "weight": weight}


def gated(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One group, gate first, as in Mamba-2."""
    x, z, weight = _random(device, dtype, 2, 200)
    return {"x": x, "z": z, "weight": weight}


def in_groups(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Three groups, gate first."""
    x, z, weight = _random(device, dtype, 2, 96)
    return {"x": x, "z": z, "weight": weight, "group_size": 32}


def norm_first_in_groups(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Four groups, norm first."""
    x, z, weight = _random(device, dtype, 2, 128)
    return {"x": x, "z": z, "weight": weight, "group_size": 32, "norm_before_gate": True}


MAKERS = {"plain": plain}
GATED_MAKERS = {"plain": gated, "in groups": in_groups, "norm first in groups": norm_first_in_groups}
