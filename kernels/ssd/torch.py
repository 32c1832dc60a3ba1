"""The chunked matmul form of SSD as a registered operator; saves its inputs and the state before each chunk.

B batch, T length, L chunk size, C chunks in a row, H heads, P head dim, G groups, N state, docs packed
documents.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.segments import document_bounds, segment_ids
from triptych.kernels.ssd import scan


@define("ssd")
def ssd_op(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, P), final state (B, H, P, N), states before each chunk (B, C, H, P, N)."""
    return scan.forward(x, dt, a, b, c, d, initial_state, segments, chunk_size)


@ssd_op.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    size = min(chunk_size, length)
    dtype = statistics_dtype(x, dt, a)
    final_state = x.new_empty(batch, heads, head_dim, b.shape[3], dtype=dtype)
    states = x.new_empty(batch, (length + size - 1) // size, heads, head_dim, b.shape[3], dtype=dtype)
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
    states: Tensor,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d (empty where there is no d) and the initial state."""
    *grads, dd, dinitial = scan.backward(dy, dfinal, x, dt, a, b, c, d, states, segments, chunk_size)
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
    states: Tensor,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dd = a.new_empty(0) if d is None else d.new_empty(d.shape)
    dx, ddt, da, db, dc = (y.new_empty(y.shape) for y in (x, dt, a, b, c))
    return dx, ddt, da, db, dc, dd, states.new_empty(states[:, 0].shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, a, b, c, d, initial_state, segments, ctx.chunk_size = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dt, a, b, c, d, output[2], segments)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, dt, a, b, c, d, states, segments = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, ddt, da, db, dc, dd, dinitial = ssd_backward_op(
        dy, dfinal, x, dt, a, b, c, d, states, segments, ctx.chunk_size
    )
    dstate = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return dx, ddt, da, db, dc, None if d is None else dd, dstate, None, None


ssd_op.register_autograd(_backward, setup_context=_setup)


def _products(x: Any, b: Any, chunk_size: int) -> tuple[int, int, int]:
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
    segments: Any,
    chunk_size: int,
    **kwargs: Any,
) -> int:
    scores, weights, states = _products(x, b, chunk_size)
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
    states: Any,
    segments: Any,
    chunk_size: int,
    **kwargs: Any,
) -> int:
    scores, weights, state = _products(x, b, chunk_size)
    # Scores again, db and dc from them; dweights and dx; from the states dstates, dc, db, dx, and y for dq.
    return 3 * scores + 2 * weights + 5 * state


def _document_states(
    y: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Add to y what each packed document's own initial state gives, and find its final state.

    The scan is linear, so both are sums over the document's tokens; autograd by PyTorch, a document at a
    time.
    """
    dtype = statistics_dtype(x, dt, a)
    repeats = x.shape[2] // b.shape[2]
    flat_x, flat_dt = x.flatten(0, 1).to(dtype), dt.flatten(0, 1).to(dtype)
    flat_b, flat_c = (g.flatten(0, 1).to(dtype) for g in (b, c))
    outputs, finals = [], []
    for i, (start, end) in enumerate(document_bounds(cu_seqlens)):
        log_decay = flat_dt[start:end] * a.to(dtype)  # (T, H)
        if initial_state is not None:
            state = initial_state[i].to(dtype)
            read = torch.einsum("tgn,grpn->tgrp", flat_c[start:end], state.unflatten(0, (-1, repeats)))
            outputs.append(read.flatten(1, 2) * log_decay.cumsum(0).exp().unsqueeze(-1))
        if with_final_state:
            # Summed from the end, so that the decays of the last tokens are exact.
            after = F.pad(log_decay[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1))
            scaled = flat_x[start:end] * (flat_dt[start:end] * after.exp()).unsqueeze(-1)
            final = torch.einsum("tgrp,tgn->grpn", scaled.unflatten(1, (-1, repeats)), flat_b[start:end])
            final = final.flatten(0, 1)
            if initial_state is not None:
                final = final + log_decay.sum(0).exp()[:, None, None] * state
            finals.append(final)
    if initial_state is not None:
        y = (y.to(dtype) + torch.cat(outputs).view(y.shape)).to(y.dtype)
    return y, torch.stack(finals) if with_final_state else None


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    if cu_seqlens is None:
        y, final_state, _ = ssd_op(x, dt, a, b, c, d, initial_state, None, chunk_size)
        return y, final_state
    segments = segment_ids(cu_seqlens, x.shape[0], x.shape[1])
    y, _, _ = ssd_op(x, dt, a, b, c, d, None, segments, chunk_size)
    if initial_state is None and not with_final_state:
        return y, None
    return _document_states(y, x, dt, a, b, c, initial_state, cu_seqlens, with_final_state)
