"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch

from triptych.kernels.dispatch import Examples


def bidirectional(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two rows of 70 tokens, decays of either sign."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 70, 21, generator=generator).to(device, dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    u = torch.randn(21, generator=generator).to(device, wide)
    return {"k": k, "v": v, "w": torch.linspace(-5, 5, 21).to(device, wide), "u": u}


def causal(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The same rows one way, with initial and final states."""
    inputs = bidirectional(device, dtype)
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(2, 2, 21, generator=generator).to(device, inputs["w"].dtype)
    causally = {"bidirectional": False, "initial_state": state, "return_final_state": True}
    return inputs | {"w": inputs["w"].abs() / 5} | causally


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents of 1 to 60 tokens."""
    cu_seqlens = torch.tensor([0, 1, 3, 10, 70, 103, 140], dtype=torch.int32, device=device)
    return bidirectional(device, dtype) | {"divide_u": True, "cu_seqlens": cu_seqlens}


MAKERS: Examples = {"bidirectional": bidirectional, "causal": causal, "packed": packed}
