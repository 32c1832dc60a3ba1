"""Linear layers of many experts as one operator that saves its inputs.

A rows, E experts, I inputs, O outputs.
"""

from typing import Any

from torch import Tensor

from triptych.kernels.grouped_linear.products import (
    add_bias,
    backward_rows,
    bias_gradient,
    forward_rows,
    weight_gradient,
)
from triptych.kernels.library import autocast_dtype, define, flop_formula


@define("grouped_linear")
def grouped_linear_op(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """y (A, O)."""
    y = forward_rows(x.contiguous(), weight.contiguous(), counts)
    return y if bias is None else add_bias(y, bias, counts)


@grouped_linear_op.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@define("grouped_linear_backward")
def grouped_linear_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias (empty where there is no bias)."""
    dy = dy.contiguous()
    dx = backward_rows(dy, weight.contiguous(), counts)
    dweight = weight_gradient(dy, x.contiguous(), counts)
    return dx, dweight, bias_gradient(dy, counts) if with_bias else dy.new_empty(0)


@grouped_linear_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = dy.new_empty(weight.shape[:2] if with_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, counts, bias = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, counts)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias = grouped_linear_backward_op(dy, *ctx.saved_tensors, ctx.with_bias)
    return dx, dweight, None, dbias if ctx.with_bias else None


grouped_linear_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("grouped_linear")
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@flop_formula("grouped_linear_backward")
def _flops_backward(dy: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(x, weight)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes as in the public function; inputs are cast as autocast casts those of a linear layer."""
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return grouped_linear_op(x, weight, counts, bias)
