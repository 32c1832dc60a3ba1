"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Gates and candidates of a minGRU."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    gate = torch.rand(2, 70, 24, generator=generator)
    b = (1 - gate) * torch.randn(2, 70, 24, generator=generator)
    return {"a": gate.to(device, dtype), "b": b.to(device, dtype)}


def log_decays(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """As HGRN gives them, with states."""
    inputs = plain(device, dtype)
    state = torch.randn(2, 24, generator=torch.Generator(device="cpu").manual_seed(1))
    logs = inputs.pop("a").float().clamp(min=1e-6).log().to(dtype)
    more = {"initial_state": state.to(device), "return_final_state": True, "log_decay": True}
    return {"a": logs, **inputs, **more}


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents of several lengths with their states; decays of either sign, some of them zero."""
    inputs = plain(device, dtype)
    inputs["a"] = (2 * inputs["a"] - 1).masked_fill(inputs["a"] > 0.9, 0.0)
    cu_seqlens = torch.tensor([0, 1, 33, 70, 75, 140], dtype=torch.int32, device=device)
    state = torch.randn(5, 24, generator=torch.Generator(device="cpu").manual_seed(1))
    more = {"initial_state": state.to(device), "return_final_state": True, "cu_seqlens": cu_seqlens}
    return {**inputs, **more}


MAKERS = {"plain": plain, "log_decays": log_decays, "packed": packed}
