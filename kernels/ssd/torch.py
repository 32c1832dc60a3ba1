"""The chunked matmul form of SSD as a registered operator; saves its inputs and the state before each chunk.

B batch, T length, L chunk size, C chunks in a row, H heads, P head dim, G groups, N state, docs packed
documents.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.ssd import scan
from triptych.kernels.ssd.inputs import rotate, step_sizes
from triptych.kernels.swiglu.torch import swiglu_op


@define("ssd")
def ssd_op(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, P), final states (B or docs, H, P, N), states before each chunk (B, C, H, P, N).

    with_states: whether packed documents have initial or final states; if not, final states has no rows.
    """
    return scan.forward(x, dt, a, b, c, d, initial_state, cu_seqlens, chunk_size, with_states)


def _state_count(x: Tensor, cu_seqlens: Tensor | None, with_states: bool) -> int:
    """Rows, or documents that have states."""
    if cu_seqlens is None:
        return x.shape[0]
    return cu_seqlens.shape[0] - 1 if with_states else 0


@ssd_op.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = x.shape[:2]
    size = min(chunk_size, length)
    dtype, state_shape = statistics_dtype(x, dt, a), (*x.shape[2:], b.shape[3])
    final_state = x.new_empty(_state_count(x, cu_seqlens, with_states), *state_shape, dtype=dtype)
    states = x.new_empty(batch, (length + size - 1) // size, *state_shape, dtype=dtype)
    return x.new_empty(x.shape), final_state, states


@define("ssd_backward")
def ssd_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d (empty where there is no d) and the initial state."""
    *grads, dd, dinitial = scan.backward(
        dy, dfinal, x, dt, a, b, c, d, initial_state, states, cu_seqlens, chunk_size, with_states
    )
    dx, ddt, da, db, dc = grads
    return dx, ddt, da, db, dc, a.new_empty(0) if dd is None else dd, dinitial


@ssd_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dd = a.new_empty(0) if d is None else d.new_empty(d.shape)
    dx, ddt, da, db, dc = (y.new_empty(y.shape) for y in (x, dt, a, b, c))
    dinitial = states.new_empty(_state_count(x, cu_seqlens, with_states), *states.shape[2:])
    return dx, ddt, da, db, dc, dd, dinitial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, a, b, c, d, initial_state, cu_seqlens, ctx.chunk_size, ctx.with_states = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)
    # Rows' initial states are the states before their first chunks.
    kept = None if cu_seqlens is None else initial_state
    ctx.save_for_backward(x, dt, a, b, c, d, kept, output[2], cu_seqlens)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[0])
    *grads, dd, dinitial = ssd_backward_op(dy, dfinal, *saved, ctx.chunk_size, ctx.with_states)
    dstate = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return *grads, None if saved[5] is None else dd, dstate, None, None, None


ssd_op.register_autograd(_backward, setup_context=_setup)


def products(x: Any, b: Any, chunk_size: int) -> tuple[int, int, int]:
    """FLOPs of the three kinds of matmul: scores (L, N, L), weights (L, L, P) and states (L, P, N)."""
    batch, length, heads, head_dim = x
    groups, state = b[2], b[3]
    size = min(chunk_size, length)
    tokens = batch * size * ((length + size - 1) // size)
    return (
        2 * tokens * groups * size * state,
        2 * tokens * heads * size * head_dim,
        2 * tokens * heads * head_dim * state,
    )


@flop_formula("ssd")
def _flops(
    x: Any,
    dt: Any,
    a: Any,
    b: Any,
    c: Any,
    d: Any,
    initial: Any,
    cu_seqlens: Any,
    chunk_size: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    scores, weights, states = products(x, b, chunk_size)
    return scores + weights + 2 * states


@flop_formula("ssd_backward")
def _flops_backward(
    dy: Any,
    dfinal: Any,
    x: Any,
    dt: Any,
    a: Any,
    b: Any,
    c: Any,
    d: Any,
    initial: Any,
    states: Any,
    cu_seqlens: Any,
    chunk_size: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    scores, weights, state = products(x, b, chunk_size)
    # Scores again, db and dc from them; dweights and dx; from the states dstates, dc, db, dx, and y for dq.
    return 3 * scores + 2 * weights + 5 * state


def ssd(
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
    dt_limit: tuple[float, float],
    angles: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, statistics_dtype(x, dt, a))
    b, c = rotate(b, angles), rotate(c, angles)
    with_states = with_final_state or initial_state is not None
    y, final_state, _ = ssd_op(x, dt, a, b, c, d, initial_state, cu_seqlens, chunk_size, with_states)
    return (y if z is None else swiglu_op(z.to(x.dtype), y)), final_state if with_final_state else None
