"""Layer norm under a modulation, as written in arXiv 2212.09748."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) (1 + scale) + shift, autograd by PyTorch; shapes as in the public function."""
    dtype = statistics_dtype(x, shift, scale)
    wide = x.to(dtype)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)
