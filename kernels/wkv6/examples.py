"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH, HEADS, KEY_DIM, VALUE_DIM = 2, 70, 2, 16, 24


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two rows, every input but the options."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tokens = (BATCH, LENGTH, HEADS)
    return {
        "r": normal(*tokens, KEY_DIM),
        "k": normal(*tokens, KEY_DIM),
        "v": normal(*tokens, VALUE_DIM),
        "w": -torch.rand(*tokens, KEY_DIM, generator=generator).to(device, dtype),
        "u": normal(HEADS, KEY_DIM),
    }


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Packed documents, strong decays, states at both ends."""
    call = plain(device, dtype)
    cuts = (0, 5, 40, LENGTH, 2 * LENGTH)
    generator = torch.Generator(device="cpu").manual_seed(1)
    states = torch.randn(len(cuts) - 1, HEADS, KEY_DIM, VALUE_DIM, generator=generator)
    return call | {
        "w": 20 * call["w"],
        "initial_state": states.to(device, dtype),
        "cu_seqlens": torch.tensor(cuts, dtype=torch.int32, device=device),
        "return_final_state": True,
    }


def bidirectional(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Both directions, packed."""
    cuts = torch.tensor((0, 30, LENGTH, 2 * LENGTH), dtype=torch.int32, device=device)
    return plain(device, dtype) | {"bidirectional": True, "cu_seqlens": cuts, "scale": 0.5}


MAKERS = {"plain": plain, "packed, strong decay, states": packed, "bidirectional, packed": bidirectional}
