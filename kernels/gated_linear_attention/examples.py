"""Small calls for self-checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LENGTH, HEADS, KEY_DIM, VALUE_DIM = 70, 2, 16, 24


def _maker(
    batch: int, *decay_shape: int, strength: float = 1.0, cuts: tuple[int, ...] = ()
) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """A call with decays of that shape behind (B, T), or constant ones; cuts: starts and end of documents."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator(device="cpu").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        tokens = (batch, LENGTH, HEADS)
        shape = (batch, LENGTH, *decay_shape) if decay_shape else (HEADS,)
        call: dict[str, Any] = {
            "q": normal(*tokens, KEY_DIM),
            "k": normal(*tokens, KEY_DIM),
            "v": normal(*tokens, VALUE_DIM),
            "g": (-strength * torch.rand(shape, generator=generator)).to(device, dtype),
        }
        if cuts:
            call["initial_state"] = normal(len(cuts) - 1, HEADS, KEY_DIM, VALUE_DIM)
            call["cu_seqlens"] = torch.tensor(cuts, dtype=torch.int32, device=device)
            call["return_final_state"] = True
        return call

    return make


MAKERS = {
    "per channel": _maker(2, HEADS, KEY_DIM),
    "per channel, strong decay, packed, states": _maker(
        1, HEADS, KEY_DIM, strength=20.0, cuts=(0, 5, 40, LENGTH)
    ),
    "per head, packed, states": _maker(2, HEADS, cuts=(0, 33, LENGTH, 2 * LENGTH)),
    "constant": _maker(1),
}
