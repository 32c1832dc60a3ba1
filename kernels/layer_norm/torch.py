"""Layer norm, plain and under a modulation, as operators that keep x and two numbers per token.

B batch, T length, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype, without_autocast

_HALF = (torch.bfloat16, torch.float16)
"""Of these, PyTorch's layer norm on a CPU adds the weights' gradients up in the dtype itself: after 4,096
tokens in bf16 they are off by 14 %."""


@define("layer_norm")
def layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., C) of x's dtype, mean and rstd (...) in fp32 or fp64."""
    dtype = statistics_dtype(x, weight, bias)
    weight, bias = (p if p is None else p.to(dtype) for p in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


@layer_norm_op.register_fake
def fake_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(x, weight, bias)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@define("layer_norm_backward")
def layer_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, the latter two in fp32 or fp64, and empty where there is no such parameter."""
    dy, wide = dy.contiguous().to(mean.dtype), x.contiguous().to(mean.dtype)
    weight = None if weight is None else weight.to(mean.dtype)
    statistics = (mean.unsqueeze(-1), rstd.unsqueeze(-1))
    # A bias is asked after only, not read.
    bias = mean.new_empty(x.shape[-1]) if has_bias else None
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, wide, x.shape[-1:], *statistics, weight, bias, [True, weight is not None, has_bias]
    )
    empty = mean.new_empty(0)
    return dx.to(x.dtype), empty if weight is None else dweight, dbias if has_bias else empty.clone()


@layer_norm_backward_op.register_fake
def fake_layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[-1]
    dweight, dbias = (mean.new_empty(channels if given else 0) for given in (weight is not None, has_bias))
    return x.new_empty(x.shape), dweight, dbias


def setup_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps x, weight, mean and rstd."""
    x, weight, bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *output[1:])


def gradients_of_layer_norm(ctx: Any, dy: Tensor | None, backward_op: Any) -> tuple[Any, ...]:
    """Those of the op's arguments, by `backward_op`."""
    if dy is None:
        return None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    has_bias = ctx.bias_dtype is not None
    dx, dweight, dbias = backward_op(dy, x, weight, mean, rstd, has_bias)
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dx, dweight, dbias.to(ctx.bias_dtype) if has_bias else None, None


def _backward_of_layer_norm(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return gradients_of_layer_norm(ctx, dy, layer_norm_backward_op)


layer_norm_op.register_autograd(_backward_of_layer_norm, setup_context=setup_layer_norm)


@without_autocast
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's own operator, where it adds the weights' gradients up in fp32. Shapes as in the public
    function."""
    if x.device.type == "cpu" and x.dtype in _HALF and (weight is not None or bias is not None):
        return layer_norm_op(x, weight, bias, eps)[0]
    weight, bias = (p if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


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
def fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
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
def fake_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps x, scale, mean and rstd."""
    x, _, scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, *output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None
    return *modulated_layer_norm_backward_op(dy, *ctx.saved_tensors), None


modulated_layer_norm_op.register_autograd(_backward, setup_context=setup)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Shapes as in the public function."""
    return modulated_layer_norm_op(x, shift, scale, eps)[0]
