"""The linear recurrence in chunks as a registered operator; saves a, its result and the initial states.

B batch, T length, D channels, docs packed documents.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype
from triptych.kernels.linear_recurrence import scan


@define("linear_recurrence")
def linear_recurrence_op(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) of b's dtype, final states (B or docs, D)."""
    return scan.forward(a, b, initial_state, cu_seqlens, log_decay, chunk_size)


def fake_forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the forward op."""
    count = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return b.new_empty(b.shape), b.new_empty(count, b.shape[2], dtype=statistics_dtype(a, b))


linear_recurrence_op.register_fake(fake_forward)


@define("linear_recurrence_backward")
def linear_recurrence_backward_op(
    dh: Tensor,
    dfinal: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial states (those in fp32, fp64)."""
    return scan.backward(dh, dfinal, a, h, initial_state, cu_seqlens, log_decay, chunk_size)


def fake_backward(
    dh: Tensor,
    dfinal: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the backward op."""
    count = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dinitial = h.new_empty(count, h.shape[2], dtype=statistics_dtype(a, h))
    return a.new_empty(a.shape), h.new_empty(h.shape), dinitial


linear_recurrence_backward_op.register_fake(fake_backward)


def register_backward(forward_op: Any, backward_op: Any) -> None:
    """Let `backward_op` differentiate `forward_op`; every form has such a pair."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, initial_state, cu_seqlens, ctx.log_decay, ctx.chunk_size = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, output[0], initial_state, cu_seqlens)

    def backward(ctx: Any, dh: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        a, h, initial_state, cu_seqlens = ctx.saved_tensors
        if dh is None:
            dh = torch.zeros_like(h)
        da, db, dinitial = backward_op(
            dh, dfinal, a, h, initial_state, cu_seqlens, ctx.log_decay, ctx.chunk_size
        )
        dstate = None if initial_state is None else dinitial.to(initial_state.dtype)
        return da, db, dstate, None, None, None

    forward_op.register_autograd(backward, setup_context=setup)


register_backward(linear_recurrence_op, linear_recurrence_backward_op)


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    return linear_recurrence_op(a, b, initial_state, cu_seqlens, log_decay, chunk_size)
