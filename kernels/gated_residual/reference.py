"""The gated residual as written."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.library import statistics_dtype


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, autograd by PyTorch; shapes as in the public function."""
    dtype = statistics_dtype(x, y, gate)
    return (x.to(dtype) + gate.to(dtype) * y.to(dtype)).to(x.dtype)
