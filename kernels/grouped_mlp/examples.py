"""Small calls for self-checks: experts with many rows, few and none."""

from __future__ import annotations

from typing import Any

import torch

COUNTS, CHANNELS, INNER = (0, 19, 0, 3, 9, 0), 16, 40


def _make(device: torch.device, dtype: torch.dtype, names: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (sum(COUNTS), CHANNELS), "up": (INNER, CHANNELS), "down": (CHANNELS, INNER)} | names
    found: dict[str, Any] = {"counts": torch.tensor(COUNTS, device=device)}
    for name, shape in shapes.items():
        size = shape if name == "x" else (len(COUNTS), *shape)
        scale = shape[-1] ** -0.5 if len(shape) == 2 and name != "x" else 1.0
        found[name] = (scale * torch.randn(size, generator=generator)).to(device, dtype)
    return found


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """SwiGLU."""
    return _make(device, dtype, {"gate": (INNER, CHANNELS)})


def biased(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """SwiGLU with biases."""
    biases: dict[str, tuple[int, ...]] = {
        "up_bias": (INNER,),
        "gate_bias": (INNER,),
        "down_bias": (CHANNELS,),
    }
    return _make(device, dtype, {"gate": (INNER, CHANNELS)} | biases)


def gelu(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """GELU with one bias."""
    return _make(device, dtype, {"up_bias": (INNER,)}) | {"activation": "gelu"}


MAKERS = {"plain": plain, "biased": biased, "gelu": gelu}
