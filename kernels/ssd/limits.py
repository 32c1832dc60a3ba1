"""What the forms of SSD that need a GPU cannot do. Asked before each call, so without their imports."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels.triton_launch import fp32_too_wide

MAX_STATE = 256
"""State size whose tiles fit a GPU's registers."""
LONGEST = 60_000
"""Tokens of a row up to which mamba-ssm's 32-bit offsets hold; results are known to be wrong from 61K."""


def triton_lacks(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, **options: Any) -> str | None:
    """Why the Triton form cannot serve a call of `ssd`; None where it can."""
    if b.shape[3] > MAX_STATE:
        return f"state size {b.shape[3]} is above {MAX_STATE}"
    return fp32_too_wide(x, x.shape[3])


def mamba_ssm_lacks(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
    **options: Any,
) -> str | None:
    """Why mamba-ssm's kernels cannot serve a call of `ssd`; None where they can."""
    tensors = (x, dt, a, b, c, initial_state)
    if any(t is not None and t.dtype.itemsize == 8 for t in tensors):
        return "mamba_ssm computes in fp32 at most"
    if x.shape[1] > LONGEST:
        return f"mamba_ssm's 32-bit offsets are not safe for T={x.shape[1]}, above {LONGEST}"
    # The states before each chunk of 256 tokens are (B, C, H, P, N).
    states = -(-x.shape[1] // 256) * x.shape[0] * x.shape[2] * x.shape[3] * b.shape[3]
    if max(states, *(_span(t) for t in (x, dt, b, c))) >= 2**31:
        return "mamba_ssm's 32-bit offsets do not reach tensors of 2^31 elements"
    if cu_seqlens is not None and initial_state is not None:
        return "mamba_ssm has no initial states of packed documents"
    if cu_seqlens is not None and with_final_state:
        return "mamba_ssm's states of packed documents have no gradients"
    return None


def _span(x: Tensor) -> int:
    """Elements from the first to the last of a tensor's memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
