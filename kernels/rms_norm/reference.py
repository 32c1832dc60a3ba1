"""RMS norm as written in the paper (arXiv 1910.07467), gated and grouped as in Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None, num_groups: int) -> Tensor:
    """norm(x * silu(gate)) * weight, autograd by PyTorch; shapes as in the public function."""
    dtype = statistics_dtype(x, weight)
    v = x.to(dtype)
    if gate is not None:
        v = v * F.silu(gate.to(dtype))
    grouped = v.unflatten(-1, (num_groups, -1))
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(dtype)).to(x.dtype)
