"""The selective scan in blocks as a registered operator; saves its inputs and the state before each block.

B batch, T length, D channels, N state per channel, docs packed documents.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.selective_scan import scan


@define("selective_scan")
def selective_scan_op(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D), final states (B or docs, D, N), states before each block (B, blocks, N, D)."""
    return scan.forward(x, dt, a, b, c, d, z, dt_bias, initial_state, cu_seqlens, softplus, chunk_size)


@selective_scan_op.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    size = min(chunk_size, length)
    dtype, state = statistics_dtype(x, dt, a), a.shape[1]
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty(count, channels, state, dtype=dtype)
    states = x.new_empty(batch, (length + size - 1) // size, state, channels, dtype=dtype)
    return x.new_empty(x.shape), final_state, states


@define("selective_scan_backward")
def selective_scan_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d, z, dt_bias and the initial state, empty where one is missing."""
    grads = scan.backward(
        dy, dfinal, x, dt, a, b, c, d, z, dt_bias, initial_state, states, cu_seqlens, softplus, chunk_size
    )
    return (
        grads.x,
        grads.dt,
        grads.a.t().to(a.dtype).contiguous(),
        grads.b.to(b.dtype),
        grads.c.to(c.dtype),
        a.new_empty(0) if d is None else grads.d.to(d.dtype),
        x.new_empty(0) if grads.z is None else grads.z,
        a.new_empty(0) if dt_bias is None else grads.dt_bias.to(dt_bias.dtype),
        grads.initial,
    )


@selective_scan_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, da, db, dc = (v.new_empty(v.shape) for v in (x, dt, a, b, c))
    dd, dbias = (a.new_empty(0) if v is None else v.new_empty(v.shape) for v in (d, dt_bias))
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    return (
        dx,
        ddt,
        da,
        db,
        dc,
        dd,
        dz,
        dbias,
        states.new_empty(0 if initial_state is None else initial_state.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, ctx.softplus, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, states, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = selective_scan_backward_op(dy, dfinal, *tensors, states, cu_seqlens, ctx.softplus, ctx.chunk_size)
    given = [None if tensor is None else grad.to(tensor.dtype) for tensor, grad in zip(tensors, grads)]
    return *given, None, None, None


selective_scan_op.register_autograd(_backward, setup_context=_setup)

FORWARD_PRODUCTS = 3
"""Multiply-adds per token, channel and state: s x b, the recurrence, c.h."""
BACKWARD_PRODUCTS = 10
"""The first two again, their adjoints, db, dc, d(s x), the gradient of the decay, ds and da from it."""


@flop_formula("selective_scan")
def _flops(x: Any, dt: Any, a: Any, *args: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * FORWARD_PRODUCTS * batch * length * channels * a[1]


@flop_formula("selective_scan_backward")
def _flops_backward(dy: Any, dfinal: Any, x: Any, dt: Any, a: Any, *args: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * BACKWARD_PRODUCTS * batch * length * channels * a[1]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    y, final_state, _ = selective_scan_op(
        x, dt, a, b, c, d, z, dt_bias, initial_state, cu_seqlens, dt_softplus, chunk_size
    )
    return y, final_state
