"""What other forms cannot do, in words; read without importing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TRITON_STATES = 64
MAMBA_STATES = 256


def triton_lacks(x: Tensor, dt: Tensor, a: Tensor, *others: Tensor, **options: Any) -> str | None:
    """Why our Triton kernels cannot serve this call."""
    if a.shape[1] > TRITON_STATES:
        return f"a has {a.shape[1]} states per channel, more than registers hold; at most {TRITON_STATES}"
    return None


def mamba_ssm_lacks(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> str | None:
    """Why selective_scan_fn of mamba-ssm (2.2.6) cannot serve this call."""
    if cu_seqlens is not None:
        return "mamba-ssm's selective_scan_fn knows no packed documents"
    if initial_state is not None:
        return "mamba-ssm's selective_scan_fn takes no initial state"
    if a.shape[1] > MAMBA_STATES:
        return (
            f"mamba-ssm's selective_scan_fn takes up to {MAMBA_STATES} states per channel, a has {a.shape[1]}"
        )
    if torch.float64 in (x.dtype, dt.dtype, a.dtype):
        return "mamba-ssm's selective_scan_fn has no double precision"
    given = {v.dtype for v in (dt, b, c, z) if v is not None} - {x.dtype}
    if given:
        return f"mamba-ssm's selective_scan_fn wants dt, b, c and z in x's {x.dtype}, not {given.pop()}"
    return None
