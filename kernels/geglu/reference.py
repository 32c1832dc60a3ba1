"""GEGLU's activation, as written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up; shapes as in the public function."""
    dtype = statistics_dtype(gate, up)
    x = gate.to(dtype)
    gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return (gelu * up.to(dtype)).to(torch.promote_types(gate.dtype, up.dtype))
