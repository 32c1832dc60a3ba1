"""What the forms that are not ours, or not in PyTorch, can serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.triton_launch import fp32_too_wide

LARGEST_HEAD = 256


def triton(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, **options: Any) -> str | None:
    """Of our Triton kernels."""
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must be of one dtype, they are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] > LARGEST_HEAD:
        return f"D = {q.shape[3]} is more than {LARGEST_HEAD} channels, which a block's memory cannot hold"
    return fp32_too_wide(q, max(q.shape[3], v.shape[3]))


def fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    **options: Any,
) -> str | None:
    """Of flash-linear-attention 0.6.0."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels are made for half precision, q is {q.dtype}"
    if reason := triton(q, k, v, g, beta):
        return reason
    if q.numel() >= 2**31 or v.numel() >= 2**31:
        return "it has 32-bit offsets, and a tensor of the call has 2^31 elements"
    return None
