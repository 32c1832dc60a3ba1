"""Causal depthwise convolution over time. B batch, T length, C channels, K taps, docs packed documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.causal_conv1d import examples, external, reference
from triptych.kernels.causal_conv1d import torch as fast
from triptych.kernels.library import operator
from triptych.kernels.segments import check_cu_seqlens

MAX_TAPS_OF_TRITON = 4
"""So many rows stay in registers beside their gradients."""


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t] = act(bias + sum_k weight[:, k] x[t - (K-1) + k]), each channel for itself.

    x: (B, T, C). weight: (C, K), the last tap meets the token itself. bias: (C,). activation: "silu" or None.
    initial_state: (B or docs, C, K-1), the inputs before the first token, oldest first; None means zeros.
    cu_seqlens: packed documents, see `triptych.kernels.segments`; nothing crosses their boundaries.
    Returns y (B, T, C) of x's dtype, and with return_final_state the last K-1 inputs (B or docs, C, K-1).
    Computed in fp32 (fp64 for fp64). Raises ValueError for shapes that do not match.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            "causal_conv1d: x must be (B, T, C) and weight (C, K); "
            f"they are {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    batch, length, channels = x.shape
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"causal_conv1d: bias must be ({channels},), it is {tuple(bias.shape)}")
    if length == 0:
        raise ValueError(f"causal_conv1d: x {tuple(x.shape)} has no tokens; T must be at least 1")
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation={activation!r} is not known; use 'silu' or None")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    expected = (count, channels, weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"causal_conv1d: initial_state must be {expected}, it is {tuple(initial_state.shape)}"
        )
    options: dict[str, Any] = {
        "activation": activation,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "with_final_state": return_final_state,
    }
    chosen = dispatch.choose("causal_conv1d", form, x.device, x, weight, bias, **options)
    y, final_state = chosen.run(x, weight, bias, **options)
    return (y, final_state) if return_final_state else y


def _triton_supports(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> str | None:
    taps = weight.shape[1]
    if taps <= MAX_TAPS_OF_TRITON:
        return None
    return f"it has kernels of up to {MAX_TAPS_OF_TRITON} taps, not {taps}; long_conv is for long ones"


dispatch.register(
    "causal_conv1d",
    replace(
        external_packages.form(
            "causal_conv1d",
            "causal_conv1d",
            "triptych.kernels.causal_conv1d.external",
            "causal_conv1d",
            supports=external.supports,
        ),
        by_name_only=external.sums_in_any_order,
    ),
)
dispatch.register(
    "causal_conv1d",
    triton_launch.form("triptych.kernels.causal_conv1d.triton", "causal_conv1d", supports=_triton_supports),
)
dispatch.register("causal_conv1d", dispatch.Form("torch", fast.causal_conv1d))
dispatch.register("causal_conv1d", dispatch.Form("reference", reference.causal_conv1d))
dispatch.register_examples("causal_conv1d", causal_conv1d, examples.MAKERS)
