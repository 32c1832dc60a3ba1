"""Gated linear attention and its special cases, simple decay and retention.

B batch, T length, H heads, D key dim, E value dim, docs packed documents.
"""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.gated_linear_attention import examples, reference
from triptych.kernels.gated_linear_attention import torch as fast
from triptych.kernels.gated_linear_attention.checks import check, supported_by_fla, supported_by_triton
from triptych.kernels.library import operator


@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor: ...


@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with a decay (arXiv 2312.06635), S[t] = diag(exp g[t]) S[t-1] + k[t] v[t]^T,
    y[t] = scale S[t]^T q[t], in chunks.

    q, k: (B, T, H, D), any float dtype. v: (B, T, H, E). g: the logarithm of the decays, <= 0 (-inf forgets
    all), (B, T, H, D) per channel, (B, T, H) per head, or (H,) constant. scale: None means D^-0.5.
    initial_state: (B or docs, H, D, E), None means zeros. cu_seqlens: packed documents, see
    `triptych.kernels.segments`; each begins with its own state. chunk_size: tokens worked on by one matmul, a
    power of two; the result depends on it by rounding only.
    Returns y, shaped and typed like v, and with return_final_state the state behind the last token of each
    row or document, in fp32 (fp64 where an input is). Every input and both outputs carry gradients. Decays
    are multiplied in fp32 (fp64) whatever the inputs are, and never divided by: no decay is too strong.
    Raises ValueError for what does not fit.
    """
    check("gated_linear_attention", ("q", "k", "v", "g"), q, k, v, g, initial_state, cu_seqlens, chunk_size)
    options = {
        "scale": q.shape[3] ** -0.5 if scale is None else scale,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
    }
    chosen = dispatch.choose("gated_linear_attention", form, q.device, q, k, v, g, **options)
    y, final_state = chosen.run(q, k, v, g, **options)
    return (y, final_state) if return_final_state else y


@overload
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor: ...


@overload
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Retention (arXiv 2307.08621, section 2.2, before its group norm): gated linear attention with the
    constant decay 1 - 2^(-5-h) of head h = 0, 1, ... Arguments and result as of `gated_linear_attention`."""
    if q.dim() != 4:
        raise ValueError(f"retention: q must be (B, T, H, D), it is {tuple(q.shape)}")
    dtype = fast.statistics_dtype(q)
    decays = [math.log1p(-(2.0 ** (-5 - h))) for h in range(q.shape[2])]
    g = q.new_tensor(decays, dtype=dtype)
    options = {
        "scale": scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "form": form,
    }
    if return_final_state:
        return gated_linear_attention(q, k, v, g, return_final_state=True, **options)  # type: ignore[call-overload]
    return gated_linear_attention(q, k, v, g, **options)  # type: ignore[call-overload]


_FOLDER = "triptych.kernels.gated_linear_attention"
dispatch.register(
    "gated_linear_attention",
    external_packages.form(
        "fla", "fla", f"{_FOLDER}.external", "gated_linear_attention", supports=supported_by_fla
    ),
)
dispatch.register(
    "gated_linear_attention",
    triton_launch.form(f"{_FOLDER}.triton", "gated_linear_attention", supports=supported_by_triton),
)
dispatch.register("gated_linear_attention", dispatch.Form("torch", fast.gated_linear_attention))
dispatch.register("gated_linear_attention", dispatch.Form("reference", reference.gated_linear_attention))
dispatch.register_examples("gated_linear_attention", gated_linear_attention, examples.MAKERS)
