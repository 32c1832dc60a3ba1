"""Causal convolution with long kernels (Hyena, S4). B batch, T length, C channels, K taps, docs documents.

The fast form is PyTorch's own FFT, on GPUs cuFFT. There is no Triton form: the transforms are what it would
have to beat, and what goes on between them is a small part of the time.
"""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.library import operator
from triptych.kernels.long_conv import examples, reference
from triptych.kernels.long_conv import torch as fast
from triptych.kernels.segments import check_cu_seqlens


@operator()
def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    d: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """y[t] = sum_s kernel[:, s] x[t - s] + d x[t], each channel for itself, as in S4 (arXiv 2111.00396) and
    Hyena (arXiv 2302.10866, section 3).

    x: (B, T, C), any float dtype. kernel: (C, K), of any length: the first tap meets the token itself (the
    other way round than in causal_conv1d), taps from T on meet nothing. d: (C,), None for none. cu_seqlens:
    packed documents, see `triptych.kernels.segments`; nothing crosses their boundaries.
    Returns y (B, T, C) of x's dtype. Computed in fp32 (fp64 where x or kernel is); errors are relative to the
    largest values of a document, not to each one. Every floating input carries a gradient. Saves its inputs.
    Raises ValueError for what does not fit.
    """
    if x.dim() != 3 or kernel.dim() != 2 or kernel.shape[0] != x.shape[2]:
        raise ValueError(
            "long_conv: x must be (B, T, C) and kernel (C, K); "
            f"they are {tuple(x.shape)} and {tuple(kernel.shape)}"
        )
    if x.shape[1] == 0 or kernel.shape[1] == 0:
        raise ValueError(
            f"long_conv: x {tuple(x.shape)} and kernel {tuple(kernel.shape)} need at least 1 token and 1 tap"
        )
    if d is not None and d.shape != x.shape[2:]:
        raise ValueError(f"long_conv: d must be (C,) = ({x.shape[2]},), it is {tuple(d.shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    return dispatch.choose("long_conv", form, x.device).run(x, kernel, d=d, cu_seqlens=cu_seqlens)


dispatch.register("long_conv", dispatch.Form("torch", fast.long_conv))
dispatch.register("long_conv", dispatch.Form("reference", reference.long_conv))
dispatch.register_examples("long_conv", long_conv, examples.MAKERS)
