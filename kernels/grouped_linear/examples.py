"""Small calls for self-checks: experts with many rows, few and none."""

from __future__ import annotations

from typing import Any

import torch

COUNTS, INPUTS, OUTPUTS = (0, 19, 0, 3, 9, 0), 40, 24


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes that fill 16 bytes."""
    return _make(device, dtype, INPUTS, OUTPUTS)


def odd(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Odd sizes and a bias."""
    found = _make(device, dtype, INPUTS - 3, OUTPUTS - 5)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(len(COUNTS), OUTPUTS - 5, generator=generator)
    return found | {"bias": bias.to(device, dtype)}


def _make(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(sum(COUNTS), inputs, generator=generator).to(device, dtype),
        "weight": torch.randn(len(COUNTS), outputs, inputs, generator=generator).to(device, dtype),
        "counts": torch.tensor(COUNTS, device=device),
    }


MAKERS = {"plain": plain, "odd": odd}
