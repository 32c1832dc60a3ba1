"""Causal convolution with long kernels as a sum over taps. T length of a document, C channels, K taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


def _document(x_TC: Tensor, kernel: Tensor) -> Tensor:
    """Every tap times the document moved back by as many tokens."""
    length = x_TC.shape[0]
    taps = kernel.unbind(1)[:length]
    return torch.stack([F.pad(x_TC, (0, 0, s, 0))[:length] * tap for s, tap in enumerate(taps)]).sum(0)


def long_conv(x: Tensor, kernel: Tensor, *, d: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Shapes as in the public function; autograd by PyTorch."""
    dtype = statistics_dtype(x, kernel)
    batch, length, channels = x.shape
    flat, wide = x.reshape(-1, channels).to(dtype), kernel.to(dtype)
    bounds = (
        [(i * length, (i + 1) * length) for i in range(batch)]
        if cu_seqlens is None
        else document_bounds(cu_seqlens)
    )
    y = torch.cat([_document(flat[start:end], wide) for start, end in bounds])
    if d is not None:
        y = y + d.to(dtype) * flat
    return y.view(x.shape).to(x.dtype)
