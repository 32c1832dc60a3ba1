"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch

from triptych.kernels.dispatch import Examples


def _inputs(device: torch.device, dtype: torch.dtype, states: int) -> dict[str, Any]:
    """Two rows of 70 tokens, 40 channels, 4 taps; an initial state for so many documents."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (2, 70, 40), "weight": (40, 4), "bias": (40,), "initial_state": (states, 40, 3)}
    drawn = {name: torch.randn(size, generator=generator).to(device, dtype) for name, size in sizes.items()}
    return drawn | {"activation": "silu"}


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Rows without states."""
    inputs = _inputs(device, dtype, 2)
    del inputs["initial_state"]
    return inputs


def states(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Rows with initial and final states."""
    return _inputs(device, dtype, 2) | {"return_final_state": True}


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents of 1 to 60 tokens, without states."""
    cu_seqlens = torch.tensor([0, 1, 3, 10, 70, 103, 140], dtype=torch.int32, device=device)
    return plain(device, dtype) | {"cu_seqlens": cu_seqlens}


def packed_states(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The same documents with states."""
    return packed(device, dtype) | _inputs(device, dtype, 6) | {"return_final_state": True}


MAKERS: Examples = {"plain": plain, "states": states, "packed": packed, "packed_states": packed_states}
