"""Adapter to mamba-ssm's CUDA kernel of the selective scan; written for version 2.2.6's signature,
selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def arguments(
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
    with_final_state: bool,
) -> dict[str, Any]:
    """Of selective_scan_fn: time last, parameters in fp32."""

    def time_last(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.transpose(1, 2).contiguous()

    def wide(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(torch.float32).contiguous()

    return {
        "u": time_last(x),
        "delta": time_last(dt),
        "A": wide(a),
        "B": time_last(b),
        "C": time_last(c),
        "D": wide(d),
        "z": time_last(z),
        "delta_bias": wide(dt_bias),
        "delta_softplus": dt_softplus,
        "return_last_state": with_final_state,
    }


def selective_scan(
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
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    given = arguments(
        x,
        dt,
        a,
        b,
        c,
        d=d,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        with_final_state=with_final_state,
    )
    result = selective_scan_fn(**given)
    y, final_state = result if with_final_state else (result, None)
    return y.transpose(1, 2), final_state
