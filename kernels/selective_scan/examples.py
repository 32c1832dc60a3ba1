"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch


def _inputs(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, channels: int, state: int
) -> dict[str, Any]:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    by_token = {
        "x": normal(batch, length, channels),
        "dt": normal(batch, length, channels) - 1,
        "b": normal(batch, length, state),
        "c": normal(batch, length, state),
    }
    a = -torch.arange(1.0, state + 1).expand(channels, state)
    inputs = {k: v.to(device, dtype) for k, v in by_token.items()}
    wide = torch.promote_types(dtype, torch.float32)
    return {**inputs, "a": a.contiguous().to(device, wide)}


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """As every form can serve it."""
    return _inputs(device, dtype, batch=1, length=70, channels=6, state=2)


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents of several lengths with their states, and all options; sizes that are no powers of two."""
    inputs = _inputs(device, dtype, batch=2, length=35, channels=5, state=3)
    generator = torch.Generator(device="cpu").manual_seed(1)
    more = {
        "d": torch.randn(5, generator=generator).to(inputs["a"]),
        "z": torch.randn(2, 35, 5, generator=generator).to(device, dtype),
        "dt_bias": torch.randn(5, generator=generator).to(inputs["a"]),
        "initial_state": torch.randn(5, 5, 3, generator=generator).to(inputs["a"]),
    }
    cu_seqlens = torch.tensor([0, 1, 20, 35, 38, 70], dtype=torch.int32, device=device)
    return {**inputs, **more, "cu_seqlens": cu_seqlens, "return_final_state": True}


MAKERS = {"plain": plain, "packed": packed}
