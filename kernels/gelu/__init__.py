"""GELU: PyTorch's own operator, which saves its input and nothing else."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import operator


@operator()
def gelu(x: Tensor) -> Tensor:
    """x * Phi(x) in the tanh approximation (arXiv 1606.08415) that GPT-2 and its kin use; any shape."""
    return F.gelu(x, approximate="tanh")
