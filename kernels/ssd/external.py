"""SSD by mamba-ssm's Triton kernels, as of its version 2.3.2.post1; what it cannot do is in limits.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels.segments import segment_ids
from triptych.kernels.ssd.inputs import rotate

CHUNK_SIZE = 256
"""What mamba-ssm's own models use and its kernels are tuned for; results depend on it by rounding only."""


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    angles: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    arguments = arguments_of(x, dt, a, b, c, angles=angles, cu_seqlens=cu_seqlens, **options)
    if with_final_state:
        y, final_state = mamba_chunk_scan_combined(**arguments, return_final_states=True)
        return y, final_state
    return mamba_chunk_scan_combined(**arguments), None


def arguments_of(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    angles: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> dict[str, Any]:
    """The same call in mamba-ssm's words."""
    return {
        "x": x,
        "dt": dt,
        "A": a,
        "B": rotate(b, angles),
        "C": rotate(c, angles),
        "chunk_size": CHUNK_SIZE,
        "D": d,
        "z": z,
        "dt_bias": dt_bias,
        "initial_states": initial_state,
        "seq_idx": None if cu_seqlens is None else segment_ids(cu_seqlens, x.shape[0], x.shape[1]),
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
    }
