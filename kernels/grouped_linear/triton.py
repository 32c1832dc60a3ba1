"""Linear layers of many experts in Triton: no waiting for the counts, any sizes and dtypes.

A rows sorted by expert, E experts, I inputs, O outputs. Rows past the sum of the counts give zeros.
"""

from typing import Any

from torch import Tensor

from triptych.kernels.grouped_linear.triton_kernels import linear_kernel, weight_gradient_kernel
from triptych.kernels.library import autocast_dtype, define, flop_formula
from triptych.kernels.triton_launch import accumulator, dot_precision, launch, power_of_2

GROUP = 8
"""Tiles of rows that share what they read of a weight."""


def side_by_side(x: Tensor) -> Tensor:
    """x (A, C) with its channels side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def block_m(rows: int, experts: int) -> int:
    """Rows of a tile: about as many as an expert has on average, from 16 to 128."""
    return min(128, power_of_2(max(1, rows // max(1, experts))))


def tiles_of_rows(rows: int, experts: int, block: int) -> int:
    """The most tiles of rows there can be, whatever the counts are."""
    return min(rows, rows // block + experts + 1)


def constants(x: Tensor, outputs: int, inputs: int) -> dict[str, Any]:
    """Sizes of tiles and dtypes of a product of rows like x."""
    block_k = 128 // x.element_size()
    return {
        "N": outputs,
        "K": inputs,
        "PRECISION": dot_precision(x.dtype),
        "ACC": accumulator(x.dtype),
        "BLOCK_N": min(128, power_of_2(outputs)),
        "BLOCK_K": min(block_k, power_of_2(inputs)),
        "num_warps": 8,
        "num_stages": 3,
    }


def linear(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x (A, K) @ weight[e].T, weight (E, N, K), + bias[e] (E, N); `second`: x and weight of one more product,
    its weight strided like the first."""
    (rows, inputs), (experts, outputs) = x.shape, weight.shape[:2]
    y = x.new_empty(rows, outputs)
    if y.numel() == 0:
        return y
    x2, weight2 = (x, weight) if second is None else second
    x, x2 = side_by_side(x), side_by_side(x2)
    block = block_m(rows, experts)
    tiles_m = tiles_of_rows(rows, experts, block)
    sizes = constants(x, outputs, inputs) | {"E": experts, "POW_E": power_of_2(experts + 2)}
    tensors = (x, weight, x2, weight2, x if bias is None else bias.contiguous(), y, counts.contiguous())
    launch(
        linear_kernel, (tiles_m * -(-outputs // sizes["BLOCK_N"]),),
        *tensors, rows, tiles_m, x.stride(0), x2.stride(0), *weight.stride(),
        TWO=second is not None, BIASED=bias is not None, BLOCK_M=block, GROUP=GROUP, **sizes,
    )  # fmt: skip
    return y


def weight_gradient(dy: Tensor, x: Tensor, counts: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """dweight (E, N, K) and dbias (E, N), empty if not wanted, from dy (A, N) and x (A, K)."""
    (rows, outputs), inputs, experts = dy.shape, x.shape[1], counts.shape[0]
    dweight = x.new_empty(experts, outputs, inputs)
    dbias = x.new_empty((experts, outputs) if with_bias else 0)
    if rows == 0 or dweight.numel() == 0:
        return dweight.zero_(), dbias.zero_()
    dy, x = side_by_side(dy), side_by_side(x)
    # Here K is a size of the result; rows are summed over, 64 bytes of a channel's at a time.
    sizes = constants(x, outputs, inputs) | {"E": experts, "POW_E": power_of_2(experts)}
    sizes |= {"BLOCK_M": min(128 // x.element_size(), block_m(rows, experts))}
    sizes |= {"BLOCK_K": min(128, power_of_2(inputs))}
    programs = experts * -(-outputs // sizes["BLOCK_N"]) * -(-inputs // sizes["BLOCK_K"])
    tensors = (dy, x, dweight, dbias if with_bias else dweight, counts.contiguous())
    strides = (dy.stride(0), x.stride(0))
    launch(weight_gradient_kernel, (programs,), *tensors, *strides, BIASED=with_bias, **sizes)
    return dweight, dbias


@define("grouped_linear_triton")
def grouped_linear_op(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """y (A, O)."""
    return linear(x, weight, counts, bias)


@grouped_linear_op.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@define("grouped_linear_triton_backward")
def grouped_linear_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias (empty where there is no bias)."""
    return linear(dy, weight.mT, counts), *weight_gradient(dy, x, counts, with_bias)


@grouped_linear_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(weight.shape[:2] if with_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, counts, bias = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, counts)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias = grouped_linear_backward_op(dy, *ctx.saved_tensors, ctx.with_bias)
    return dx, dweight, None, dbias if ctx.with_bias else None


grouped_linear_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("grouped_linear_triton")
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@flop_formula("grouped_linear_triton_backward")
def _flops_backward(dy: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(x, weight)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes as in the public function; inputs are cast as autocast casts those of a linear layer."""
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return grouped_linear_op(x, weight, counts, bias)
