"""Experts' feed-forwards as one operator that saves its inputs and the pre-activations.

A rows, E experts, C channels, F inner channels. On the CPU one expert is worked on at a time, forward and
backward, so that what lies between its products stays small and near; on a GPU all at once, by grouped
products that do not wait for the counts.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from triptych.kernels.grouped_mlp import experts
from triptych.kernels.library import autocast_dtype, define, flop_formula


@define("grouped_mlp")
def grouped_mlp_op(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """y (A, C) and what goes into the activation: up (A, F) in pieces of rows, then gate, if there is one."""
    return experts.forward(x, up, down, counts, gate, up_bias, gate_bias, down_bias)


@grouped_mlp_op.register_fake
def _(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape), experts.pieces(x, up.shape[1], 1 if gate is None else 2)


@define("grouped_mlp_backward")
def grouped_mlp_backward_op(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    inner: Sequence[Tensor],
    with_bias: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, down, gate, up_bias, gate_bias, down_bias; empty where there is no such input."""
    found = experts.backward(dy, x, up, down, counts, gate, inner, with_bias)
    dx, dup, ddown, *rest = found
    dgate, dup_bias, dgate_bias, ddown_bias = (x.new_empty(0) if y is None else y for y in rest)
    return dx, dup, ddown, dgate, dup_bias, dgate_bias, ddown_bias


@grouped_mlp_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    inner: Sequence[Tensor],
    with_bias: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dup, ddown = (y.new_empty(y.shape) for y in (x, up, down))
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    sizes = (up.shape[:2], up.shape[:2], down.shape[:2])
    biases = [x.new_empty(size if wanted else 0) for size, wanted in zip(sizes, with_bias, strict=True)]
    return dx, dup, ddown, dgate, biases[0], biases[1], biases[2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, up, down, counts, gate, *biases = inputs
    ctx.with_bias = [bias is not None for bias in biases]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, up, down, counts, gate, *output[1])


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 8
    # Taken once: recomputation lets nobody unpack them again.
    x, up, down, counts, gate, *inner = ctx.saved_tensors
    found = grouped_mlp_backward_op(dy, x, up, down, counts, gate, inner, ctx.with_bias)
    dx, dup, ddown, dgate, *dbiases = found
    biases = [dbias if given else None for dbias, given in zip(dbiases, ctx.with_bias, strict=True)]
    return dx, dup, ddown, None, None if gate is None else dgate, *biases


grouped_mlp_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("grouped_mlp")
def _flops(x: Any, up: Any, down: Any, counts: Any, gate: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * up[1] * up[2] * (2 if gate is None else 3)


@flop_formula("grouped_mlp_backward")
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
