"""Small calls for self-checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def both_ways(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Losses per token, and of another call their sum: gradients under unlike cotangents and under one."""
    from triptych.kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(**arguments), linear_cross_entropy(**arguments).sum()


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """19 tokens, one of them ignored; an odd vocabulary."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(301, (19,), generator=generator)
    targets[7] = -100
    return {
        "hidden": torch.randn(19, 32, generator=generator).to(device, dtype),
        "weight": torch.randn(301, 32, generator=generator).div(4).to(device, dtype),
        "targets": targets.to(device),
    }


def options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """With a cap, a z-loss and several chunks, the last one shorter."""
    return plain(device, dtype) | {"softcap": 5.0, "z_loss": 1e-2, "chunk_size": 8}


def recomputed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The same with gradients from the logits computed again."""
    return options(device, dtype) | {"recompute": True}


MAKERS = {"plain": plain, "options": options, "recomputed": recomputed}
