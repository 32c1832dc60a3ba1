"""Layer norm, and layer norm under a modulation. B batch, T length, C channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.layer_norm import reference
from triptych.kernels.layer_norm import torch as fast
from triptych.kernels.library import without_autocast

dispatch.register("modulated_layer_norm", dispatch.Form("torch", fast.modulated_layer_norm))
dispatch.register("modulated_layer_norm", dispatch.Form("reference", reference.modulated_layer_norm))


@without_autocast
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv 1607.06450) over the last dim.

    x: (..., C). weight, bias: (C,) or None. Statistics are fp32 inside; the result has x's dtype, under
    autocast too, so that no fp32 copy of a bf16 stream is kept. PyTorch's own operator, which saves its input
    and two numbers per token. Raises ValueError for shapes that do not match.
    """
    channels = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(
                f"layer_norm: {name} must be ({channels},) like x's last dim, it is {tuple(parameter.shape)}"
            )
    weight, bias = (p if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.layer_norm(x, (channels,), weight, bias, eps)


def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, form: str | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (1 + scale) + shift over the last dim (adaLN, arXiv 2212.09748).

    x: (B, T, C). shift, scale: of one shape and dtype, each dim of it 1 or x's, and C the last: (B, 1, C) for
    one modulation per row, (B, T, C) for one per token. Computed in fp32 (fp64 for fp64 inputs); the result
    has x's dtype. Saved for backward: x, scale and two numbers per token; the normed x is computed again.
    Raises ValueError for shapes that do not match.
    """
    if (shift.shape, shift.dtype) != (scale.shape, scale.dtype):
        raise ValueError(
            f"modulated_layer_norm: shift {tuple(shift.shape)} {shift.dtype} and scale {tuple(scale.shape)} "
            f"{scale.dtype} must have one shape and dtype"
        )
    fits = shift.dim() == x.dim() and all(m in (1, n) for m, n in zip(shift.shape, x.shape))
    if not fits or shift.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"modulated_layer_norm: shift and scale {tuple(shift.shape)} must have x's dims "
            f"{tuple(x.shape)}, or 1 in place of those before the last"
        )
    return dispatch.choose("modulated_layer_norm", form, x.device).run(x, shift, scale, eps)
