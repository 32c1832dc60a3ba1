"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def _inputs(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, documents: int | None = None
) -> dict[str, Any]:
    """Two heads; an initial state for each document where their number is given."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "q": normal(batch, length, 2, 16).to(dtype),
        "k": F.normalize(normal(batch, length, 2, 16), dim=-1).to(dtype),
        "v": normal(batch, length, 2, 32).to(dtype),
        "g": F.logsigmoid(normal(batch, length, 2) + 2).to(wide),
        "beta": torch.sigmoid(normal(batch, length, 2)).to(dtype),
    }
    if documents is not None:
        inputs["initial_state"] = normal(documents, 2, 16, 32).to(wide)
    return {name: x.to(device) for name, x in inputs.items()}


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two chunks, the second one not full."""
    return _inputs(device, dtype, 1, 70)


def ungated(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The plain delta rule, which other packages have apart; two rows."""
    return {**_inputs(device, dtype, 2, 20), "g": None}


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents of 1 to 69 tokens with states; queries and keys as long as they come."""
    cu_seqlens = torch.tensor([0, 1, 70, 110], dtype=torch.int32, device=device)
    inputs = _inputs(device, dtype, 1, 110, documents=3)
    return {**inputs, "cu_seqlens": cu_seqlens, "return_final_state": True, "normalize": True}


MAKERS = {"plain": plain, "ungated": ungated, "packed": packed}
