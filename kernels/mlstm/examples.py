"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch


def _inputs(device: torch.device, dtype: torch.dtype, batch: int, length: int) -> dict[str, Any]:
    """Two heads."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "q": normal(batch, length, 2, 16).to(dtype),
        "k": normal(batch, length, 2, 16).to(dtype),
        "v": normal(batch, length, 2, 32).to(dtype),
        "igate": normal(batch, length, 2).to(wide),
        "fgate": (normal(batch, length, 2) + 2).to(wide),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two chunks, the second one not full."""
    return _inputs(device, dtype, 1, 70)


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents of 1 to 39 tokens, in two rows."""
    cu_seqlens = torch.tensor([0, 1, 40, 80], dtype=torch.int32, device=device)
    return {**_inputs(device, dtype, 2, 40), "cu_seqlens": cu_seqlens}


def continued(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """From an initial state on."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    memory = torch.randn(1, 2, 16, 33, generator=generator).to(device, wide)
    m = torch.randn(1, 2, generator=generator).to(device, wide)
    return {**_inputs(device, dtype, 1, 20), "initial_state": (memory, m)}


MAKERS = {"plain": plain, "packed": packed, "continued": continued}
