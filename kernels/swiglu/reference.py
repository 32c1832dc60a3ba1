"""SwiGLU's activation, as written."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; shapes as in the public function."""
    dtype = statistics_dtype(gate, up)
    wide = gate.to(dtype)
    return (wide * torch.sigmoid(wide) * up.to(dtype)).to(torch.promote_types(gate.dtype, up.dtype))
