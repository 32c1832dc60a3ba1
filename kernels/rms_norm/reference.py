"""RMS norm as written in the paper (arXiv 1910.07467), gated and grouped as in Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None, num_groups: int, norm_before_gate: bool
) -> Tensor:
    """norm(x * silu(gate)) * weight or norm(x) * weight * silu(gate), autograd by PyTorch; shapes as in the
    public functions."""
    dtype = statistics_dtype(x, weight)
    v = x.to(dtype)
    if gate is not None and not norm_before_gate:
        v = v * F.silu(gate.to(dtype))
    grouped = v.unflatten(-1, (num_groups, -1))
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = normed.flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * F.silu(gate.to(dtype))
    return y.to(x.dtype)
