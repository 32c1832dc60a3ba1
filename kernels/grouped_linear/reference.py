"""A linear layer for each expert, one after the other. A rows, E experts, I inputs, O outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes as in the public function; autograd by PyTorch."""
    parts = x.split(counts.tolist())
    biases = [None] * len(parts) if bias is None else list(bias)
    return torch.cat([F.linear(part, w, b) for part, w, b in zip(parts, weight, biases, strict=True)])
