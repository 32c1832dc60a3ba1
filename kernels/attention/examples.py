"""Small calls of `attention` that self-checks make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triptych.kernels import dispatch

LENGTH = 70


def _inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two rows of 70 tokens, four heads on two key/value heads of 16."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(2, LENGTH, heads, 16, generator=generator).to(device, dtype)

    return {"q": normal(4), "k": normal(2), "v": normal(2)}


def _sink(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([-1.0, 0.0, 1.0, 2.0], device=device, dtype=dtype)


def _documents(device: torch.device) -> Tensor:
    return torch.tensor([0, 1, 30, 70, 128, 140], dtype=torch.int32, device=device)


def plain(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Causal attention."""
    return _inputs(device, dtype)


def packed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents, causal."""
    return {**_inputs(device, dtype), "cu_seqlens": _documents(device)}


def windowed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents and a window on both sides."""
    return {**packed(device, dtype), "causal": False, "window": (9, 5)}


def cached(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Fewer queries than keys."""
    inputs = _inputs(device, dtype)
    return {**inputs, "q": inputs["q"][:, -9:].clone(), "window": 20}


def capped(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A soft-cap and a causal window."""
    return {**_inputs(device, dtype), "window": 20, "softcap": 2.0}


def with_sink(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A sink, documents and a causal window."""
    return {**packed(device, dtype), "window": 20, "sink": _sink(device, dtype)}


def masked(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A mask of its own for each row and head, and queries that see nothing."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    mask = torch.rand(2, 4, LENGTH, LENGTH, generator=generator) < 0.3
    mask[:, :, 5] = False
    return {**_inputs(device, dtype), "mask": mask.to(device)}


def everything(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Documents, a window on both sides, a soft-cap, a sink and a bias."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    bias = torch.randn(4, LENGTH, LENGTH, generator=generator).to(device, dtype)
    return {**windowed(device, dtype), "softcap": 2.0, "sink": _sink(device, dtype), "mask": bias}


MAKERS: dispatch.Examples = {
    "plain": plain,
    "packed": packed,
    "windowed": windowed,
    "cached": cached,
    "capped": capped,
    "with_sink": with_sink,
    "masked": masked,
    "everything": everything,
}
