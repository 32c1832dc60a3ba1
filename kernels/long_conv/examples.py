"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch

from triptych.kernels.dispatch import Examples


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two rows of 70 tokens, a kernel as long."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (2, 70, 9), "kernel": (9, 70)}
    return {name: torch.randn(size, generator=generator).to(device, dtype) for name, size in sizes.items()}


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents of 1 to 60 tokens, with the skip."""
    cu_seqlens = torch.tensor([0, 1, 3, 10, 70, 103, 140], dtype=torch.int32, device=device)
    d = torch.linspace(-1, 1, 9).to(device, dtype)
    return plain(device, dtype) | {"d": d, "cu_seqlens": cu_seqlens}


MAKERS: Examples = {"plain": plain, "packed": packed}
