"""Selective scan (Mamba-1).

B batch, T length, D channels, N state per channel, docs packed documents.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.library import operator, statistics_dtype
from triptych.kernels.segments import check_cu_seqlens
from triptych.kernels.selective_scan import examples, reference
from triptych.kernels.selective_scan import torch as fast
from triptych.kernels.selective_scan.limits import mamba_ssm_lacks, triton_lacks
from triptych.kernels.selective_scan.scan import gated, time_step


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 32,
    form: str | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 32,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 32,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-1 (arXiv 2312.00752, algorithm 2), each channel for itself with N states:
    s[t] = softplus(dt[t] + dt_bias), h[t] = exp(s[t] a) h[t-1] + s[t] x[t] b[t],
    y[t] = (c[t].h[t] + d x[t]) silu(z[t]).

    x, dt, z: (B, T, D), any float dtype. a: (D, N), < 0. b, c: (B, T, N), shared by the channels. d, dt_bias:
    (D,). dt_softplus: False takes dt + dt_bias, >= 0, as it is. initial_state: (B or docs, D, N), None means
    zeros. cu_seqlens: packed documents, see `triptych.kernels.segments`; each begins with its own state.
    chunk_size: tokens between two states that are kept for backward, and worked on together; the result
    depends on it by rounding only.
    Returns y, shaped and typed like x, and with return_final_state the state after the last token of each row
    or document, in fp32 (fp64 where x, dt or a is). Every input and both outputs carry gradients. States,
    decays and the gate are computed in fp32 (fp64) whatever x is. Raises ValueError for what does not fit.
    """
    _check(x, dt, a, b, c, d, z, dt_bias, initial_state, cu_seqlens, chunk_size)
    arguments = (x, dt, a, b, c)
    options = {
        "d": d,
        "z": z,
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "with_final_state": return_final_state,
    }
    chosen = dispatch.choose("selective_scan", form, x.device, *arguments, **options)
    y, final_state = chosen.run(*arguments, **options)
    return (y, final_state) if return_final_state else y


@operator()
def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for generation.

    state: (B, D, N). x, dt, z: (B, D). a: (D, N). b, c: (B, N). d, dt_bias: (D,).
    Returns y (B, D) of x's dtype and the new state in fp32 (fp64); `state` itself is left as it is.
    """
    if state.dim() != 3 or state.shape[:2] != x.shape or dt.shape != x.shape or b.shape != c.shape:
        raise ValueError(
            "selective_scan_step: state must be (B, D, N), x and dt (B, D), b and c (B, N);"
            f" they are {', '.join(str(tuple(y.shape)) for y in (state, x, dt, b, c))}"
        )
    dtype = statistics_dtype(x, dt, a)
    step, wide = time_step(dt, dt_bias, dt_softplus, dtype), x.to(dtype)
    decay = (step.unsqueeze(-1) * a.to(dtype)).exp()
    state = decay * state.to(dtype) + (step * wide).unsqueeze(-1) * b.to(dtype).unsqueeze(1)
    y = (state * c.to(dtype).unsqueeze(1)).sum(-1)
    if d is not None:
        y = y + d.to(dtype) * wide
    return gated(y, z).to(x.dtype), state


def _check(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"selective_scan: x must be (B, T, D), it is {tuple(x.shape)}")
    batch, length, channels = x.shape
    if length == 0:
        raise ValueError(f"selective_scan: x {tuple(x.shape)} has no tokens; T must be at least 1")
    for name, value in (("dt", dt), ("z", z)):
        if value is not None and value.shape != x.shape:
            raise ValueError(
                f"selective_scan: {name} must be (B, T, D) = {tuple(x.shape)}, it is {tuple(value.shape)}"
            )
    if a.dim() != 2 or a.shape[0] != channels:
        raise ValueError(f"selective_scan: a must be (D, N) with D = {channels}, it is {tuple(a.shape)}")
    expected: tuple[int, ...] = (batch, length, a.shape[1])
    if b.shape != expected or c.shape != expected:
        raise ValueError(
            f"selective_scan: b and c must be (B, T, N) = {expected}; "
            f"they are {tuple(b.shape)} and {tuple(c.shape)}"
        )
    for name, value in (("d", d), ("dt_bias", dt_bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(
                f"selective_scan: {name} must be (D,) = ({channels},), it is {tuple(value.shape)}"
            )
    if chunk_size < 1:
        raise ValueError(f"selective_scan: chunk_size={chunk_size} must be at least 1; 32 is usual")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    expected = (count, channels, a.shape[1])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"selective_scan: initial_state must be {expected}, it is {tuple(initial_state.shape)}"
        )


dispatch.register(
    "selective_scan",
    external_packages.form(
        "mamba_ssm",
        "mamba_ssm",
        "triptych.kernels.selective_scan.external",
        "selective_scan",
        supports=mamba_ssm_lacks,
    ),
)
dispatch.register(
    "selective_scan",
    triton_launch.form("triptych.kernels.selective_scan.triton", "selective_scan", supports=triton_lacks),
)
dispatch.register("selective_scan", dispatch.Form("torch", fast.selective_scan))
dispatch.register("selective_scan", dispatch.Form("reference", reference.selective_scan))
dispatch.register_examples("selective_scan", selective_scan, examples.MAKERS)
