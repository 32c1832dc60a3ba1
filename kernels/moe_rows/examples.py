"""Small calls for self-checks: 19 tokens, 3 of 5 experts each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.moe_rows.plan import moe_plan

TOKENS, SLOTS, EXPERTS, CHANNELS = 19, 3, 5, 40


def _plan(generator: torch.Generator, dropped: bool) -> tuple[Tensor, Tensor]:
    experts = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :SLOTS]
    if dropped:
        experts = experts.where(torch.rand(TOKENS, SLOTS, generator=generator) < 0.6, EXPERTS)
    return moe_plan(experts, EXPERTS)[:2]


def _gather(device: torch.device, dtype: torch.dtype, dropped: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens, slots = _plan(generator, dropped)
    x = torch.randn(TOKENS, CHANNELS, generator=generator).to(device, dtype)
    return {"x": x, "tokens": tokens.to(device), "slots": slots.to(device)}


def gather(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Every choice leads somewhere."""
    return _gather(device, dtype, dropped=False)


def gather_some(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Some choices lead nowhere."""
    return _gather(device, dtype, dropped=True)


def _combine(device: torch.device, dtype: torch.dtype, dropped: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens, slots = _plan(generator, dropped)
    return {
        "rows": torch.randn(tokens.shape[0], CHANNELS, generator=generator).to(device, dtype),
        "weights": torch.rand(slots.shape, generator=generator).to(device),
        "slots": slots.to(device),
        "tokens": tokens.to(device),
    }


def combine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Weights in fp32, as routers have them."""
    return _combine(device, dtype, dropped=False)


def combine_some(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Some choices lead nowhere."""
    return _combine(device, dtype, dropped=True)


GATHER_MAKERS = {"plain": gather, "some nowhere": gather_some}
COMBINE_MAKERS = {"plain": combine, "some nowhere": combine_some}
