"""Layer norm as written in arXiv 1607.06450, and under a modulation as in arXiv 2212.09748."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def _normed(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """norm(x) weight + bias, autograd by PyTorch; shapes as in the public function."""
    dtype = statistics_dtype(x, weight, bias)
    y = _normed(x.to(dtype), eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) (1 + scale) + shift, autograd by PyTorch; shapes as in the public function."""
    dtype = statistics_dtype(x, shift, scale)
    return (_normed(x.to(dtype), eps) * (1 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)
