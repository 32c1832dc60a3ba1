"""What the Triton form can serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels.triton_launch import fp32_too_wide

LARGEST_HEAD = 256


def triton(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, **options: Any) -> str | None:
    """None, or the reason why not."""
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must be of one dtype, they are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] > LARGEST_HEAD:
        return f"D = {q.shape[3]} is more than {LARGEST_HEAD} channels, which a block's memory cannot hold"
    return fp32_too_wide(q, max(q.shape[3], v.shape[3]))
