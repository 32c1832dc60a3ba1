"""Layer norm under a modulation as one operator that keeps no normed x. B batch, T length, C channels."""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype


@define("modulated_layer_norm")
def modulated_layer_norm_op(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, C) of x's dtype, mean and rstd (B, T, 1) in fp32 or fp64."""
    dtype = statistics_dtype(x, shift, scale)
    normed, mean, rstd = torch.native_layer_norm(x.to(dtype), x.shape[-1:], None, None, eps)
    torch.addcmul(shift.to(dtype), normed, 1 + scale.to(dtype), out=normed)
    return normed.to(x.dtype), mean, rstd


@modulated_layer_norm_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=statistics_dtype(x, shift, scale)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@define("modulated_layer_norm_backward")
def modulated_layer_norm_backward_op(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dshift and dscale."""
    dy, wide = dy.to(mean.dtype), x.to(mean.dtype)
    dnormed = dy * (1 + scale.to(mean.dtype))
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormed, wide, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )
    terms = torch.sub(wide, mean, out=dnormed).mul_(rstd).mul_(dy)
    dshift, dscale = (sums.sum_to_size(scale.shape).to(scale.dtype, copy=True) for sums in (dy, terms))
    return dx.to(x.dtype), dshift, dscale


@modulated_layer_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, *output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None
    return *modulated_layer_norm_backward_op(dy, *ctx.saved_tensors), None


modulated_layer_norm_op.register_autograd(_backward, setup_context=_setup)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Shapes as in the public function."""
    return modulated_layer_norm_op(x, shift, scale, eps)[0]
