"""Layer norm: PyTorch's own operator, which saves its input and two numbers per token. C channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import without_autocast


@without_autocast
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv 1607.06450) over the last dim.

    x: (..., C). weight, bias: (C,) or None. Statistics are fp32 inside; the result has x's dtype, under
    autocast too, so that no fp32 copy of a bf16 stream is kept. Raises ValueError for shapes that do not
    match.
    """
    channels = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(
                f"layer_norm: {name} must be ({channels},) like x's last dim, it is {tuple(parameter.shape)}"
            )
    weight, bias = (p if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.layer_norm(x, (channels,), weight, bias, eps)
