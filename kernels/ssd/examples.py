"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch

LENGTH = 70


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What every form can serve: more than one chunk, two groups of heads."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": normal(1, LENGTH, 4, 16).to(dtype),
        "dt": normal(1, LENGTH, 4).sigmoid(),
        "a": -normal(4).exp(),
        "b": normal(1, LENGTH, 2, 16).to(dtype),
        "c": normal(1, LENGTH, 2, 16).to(dtype),
        "d": normal(4),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def gated(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Raw step sizes, the gate, a state before and after."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    inputs = plain(device, dtype)
    states = {
        "dt_bias": torch.randn(4, generator=generator),
        "initial_state": torch.randn(1, 4, 16, 16, generator=generator),
        "z": torch.randn(1, LENGTH, 4, 16, generator=generator).to(dtype),
    }
    inputs |= {name: value.to(device) for name, value in states.items()}
    return inputs | {"dt_softplus": True, "dt_limit": (0.1, 3.0), "return_final_state": True}


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents with states of their own, b and c rotated."""
    generator = torch.Generator(device="cpu").manual_seed(2)
    return plain(device, dtype) | {
        "angles": torch.randn(1, LENGTH, 2, 8, generator=generator).to(device),
        "initial_state": torch.randn(3, 4, 16, 16, generator=generator).to(device),
        "cu_seqlens": torch.tensor([0, 5, 64, LENGTH], dtype=torch.int32, device=device),
        "return_final_state": True,
    }


MAKERS = {"plain": plain, "gated": gated, "packed": packed}
