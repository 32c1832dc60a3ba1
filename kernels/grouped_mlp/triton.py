"""Experts' feed-forwards in Triton: the activation is made where the products end; counts stay on the device.

A rows sorted by expert, E experts, C channels, F inner channels. Forward is two kernels: up, gate and
activation; down. Backward is one for the gradients of what goes into the activation, which makes that once
more, one for dx and one for each weight. Rows past the sum of the counts give zeros. What is kept is what the
torch form keeps.
"""

from typing import Any

from torch import Tensor

from triptych.kernels.grouped_linear.triton import (
    GROUP,
    block_m,
    constants,
    linear,
    side_by_side,
    tiles_of_rows,
    weight_gradient,
)
from triptych.kernels.grouped_mlp.triton_kernels import inner_backward_kernel, inner_kernel
from triptych.kernels.library import autocast_dtype, define, flop_formula
from triptych.kernels.triton_launch import launch, power_of_2


def _sizes(x: Tensor, outputs: int, inputs: int, experts: int, block: int) -> dict[str, Any]:
    """As of a product, with narrower tiles: two of them are summed up, or read beside the sum."""
    found = constants(x, outputs, inputs)
    experts_and_tiles = {"E": experts, "POW_E": power_of_2(experts + 2), "BLOCK_M": block, "GROUP": GROUP}
    return found | experts_and_tiles | {"BLOCK_N": min(64, found["BLOCK_N"])}


@define("grouped_mlp_triton")
def grouped_mlp_op(
    x: Tensor, up: Tensor, down: Tensor, counts: Tensor, gate: Tensor | None, up_bias: Tensor | None,
    gate_bias: Tensor | None, down_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (A, C) and what goes into the activation: up (A, F) and gate (A, F), empty where there is none."""
    (rows, channels), (experts, inner) = x.shape, up.shape[:2]
    out_up = x.new_empty(rows, inner)
    out_gate = x.new_empty(0 if gate is None else (rows, inner))
    if rows == 0 or inner == 0:
        return x.new_zeros(rows, channels), out_up, out_gate
    x, counts, up = side_by_side(x), counts.contiguous(), up.contiguous()
    h, block = x.new_empty(rows, inner), block_m(rows, experts)
    tiles_m = tiles_of_rows(rows, experts, block)
    sizes = _sizes(x, inner, channels, experts, block)
    weights = (up, up if gate is None else gate.contiguous())
    biases = [x if bias is None else bias.contiguous() for bias in (up_bias, gate_bias)]
    launch(
        inner_kernel, (tiles_m * -(-inner // sizes["BLOCK_N"]),),
        x, *weights, *biases, out_up, out_gate, h, counts, rows, tiles_m, x.stride(0), *up.stride(),
        GATED=gate is not None, UP_BIASED=up_bias is not None, GATE_BIASED=gate_bias is not None, **sizes,
    )  # fmt: skip
    return linear(h, down, counts, down_bias), out_up, out_gate


@grouped_mlp_op.register_fake
def _(
    x: Tensor, up: Tensor, down: Tensor, counts: Tensor, gate: Tensor | None, up_bias: Tensor | None,
    gate_bias: Tensor | None, down_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out_up = x.new_empty(x.shape[0], up.shape[1])
    return x.new_empty(x.shape), out_up, x.new_empty(0 if gate is None else out_up.shape)


@define("grouped_mlp_triton_backward")
def grouped_mlp_backward_op(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, counts: Tensor, gate: Tensor | None, inner_up: Tensor,
    inner_gate: Tensor, with_bias: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, up, down, gate, up_bias, gate_bias, down_bias; empty where there is no such input."""
    (rows, channels), (experts, inner) = x.shape, up.shape[:2]
    dy, counts, up = side_by_side(dy), counts.contiguous(), up.contiguous()
    h, dinner_up, dinner_gate = (y.new_empty(y.shape) for y in (inner_up, inner_up, inner_gate))
    if rows and inner:
        block = block_m(rows, experts)
        tiles_m = tiles_of_rows(rows, experts, block)
        sizes = _sizes(x, inner, channels, experts, block)
        launch(
            inner_backward_kernel, (tiles_m * -(-inner // sizes["BLOCK_N"]),),
            dy, down, inner_up, inner_gate, h, dinner_up, dinner_gate, counts, rows, tiles_m, dy.stride(0),
            *down.mT.stride(), GATED=gate is not None, **sizes,
        )  # fmt: skip
    ddown, ddown_bias = weight_gradient(dy, h, counts, with_bias[2])
    del h
    dup, dup_bias = weight_gradient(dinner_up, x, counts, with_bias[0])
    if gate is None:
        dx = linear(dinner_up, up.mT, counts)
        return dx, dup, ddown, x.new_empty(0), dup_bias, x.new_empty(0), ddown_bias
    dgate, dgate_bias = weight_gradient(dinner_gate, x, counts, with_bias[1])
    dx = linear(dinner_up, up.mT, counts, second=(dinner_gate, gate.contiguous().mT))
    return dx, dup, ddown, dgate, dup_bias, dgate_bias, ddown_bias


@grouped_mlp_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, counts: Tensor, gate: Tensor | None, inner_up: Tensor,
    inner_gate: Tensor, with_bias: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dup, ddown = (y.new_empty(y.shape) for y in (x, up, down))
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    sizes = (up.shape[:2], up.shape[:2], down.shape[:2])
    biases = [x.new_empty(size if wanted else 0) for size, wanted in zip(sizes, with_bias, strict=True)]
    return dx, dup, ddown, dgate, biases[0], biases[1], biases[2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, down, counts, gate, *biases = inputs
    ctx.with_bias = [bias is not None for bias in biases]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, up, down, counts, gate, *output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    dx, dup, ddown, dgate, *dbiases = grouped_mlp_backward_op(dy, *saved, ctx.with_bias)
    biases = [dbias if given else None for dbias, given in zip(dbiases, ctx.with_bias, strict=True)]
    return dx, dup, ddown, None, None if saved[4] is None else dgate, *biases


grouped_mlp_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("grouped_mlp_triton")
def _flops(x: Any, up: Any, down: Any, counts: Any, gate: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * up[1] * up[2] * (2 if gate is None else 3)


@flop_formula("grouped_mlp_triton_backward")
def _flops_backward(
    dy: Any, x: Any, up: Any, down: Any, counts: Any, gate: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _flops(x, up, down, counts, gate)


def grouped_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Shapes as in the public function, where `activation` says whether there is a gate; inputs are cast as
    autocast casts those of a linear layer."""
    inputs = [x, up, down, gate, up_bias, gate_bias, down_bias]
    if (dtype := autocast_dtype(x)) is not None:
        inputs = [None if y is None else y.to(dtype) for y in inputs]
    return grouped_mlp_op(*inputs[:3], counts, *inputs[3:])[0]
