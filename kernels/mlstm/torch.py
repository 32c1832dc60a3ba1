"""The chunked matmul form of mLSTM as a registered operator. It saves its inputs, its output, the normaliser
and the memory before each chunk.

B batch, T length, L chunk size, C chunks in a row, H heads, D channels of queries and keys, E channels of
values, docs packed documents.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.mlstm import scan
from triptych.kernels.segments import document_bounds, segment_ids


@define("mlstm")
def mlstm_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    memory: Tensor | None,
    m: Tensor | None,
    segments: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What scan.Outputs has. memory, m: the initial state."""
    return scan.forward(q, k, v, igate, fgate, memory, m, segments, scale, chunk_size)


@mlstm_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    memory: Tensor | None,
    m: Tensor | None,
    segments: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, channels = q.shape
    size = min(chunk_size, length)
    dtype = statistics_dtype(q, v, igate)
    shape = (heads, channels, v.shape[3] + 1)
    final = q.new_empty(batch, *shape, dtype=dtype)
    memories = q.new_empty(batch, (length + size - 1) // size, *shape, dtype=dtype)
    normaliser = q.new_empty(igate.shape, dtype=dtype)
    return v.new_empty(v.shape), final, q.new_empty(batch, heads, dtype=dtype), normaliser, memories


@define("mlstm_backward")
def mlstm_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    m: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    normaliser: Tensor,
    memories: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What scan.Gradients has."""
    args = (q, k, v, igate, fgate, m, segments, y, normaliser, memories, scale, chunk_size)
    return scan.backward(dy, dfinal, *args)


@mlstm_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    m: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    normaliser: Tensor,
    memories: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, digate, dfgate = (x.new_empty(x.shape) for x in (q, k, v, igate, fgate))
    return dq, dk, dv, digate, dfgate, memories.new_empty(memories[:, 0].shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, igate, fgate, memory, m, segments, ctx.scale, ctx.chunk_size = inputs
    y, _, final_m, normaliser, memories = output
    ctx.mark_non_differentiable(final_m, normaliser, memories)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, igate, fgate, memory, m, segments, y, normaliser, memories)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, igate, fgate, memory, m, segments, y, normaliser, memories = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    args = (m, segments, y, normaliser, memories, ctx.scale, ctx.chunk_size)
    *grads, dinitial = mlstm_backward_op(dy, dfinal, q, k, v, igate, fgate, *args)
    dmemory = dm = None
    if memory is not None:
        # A larger m is a larger memory.
        dmemory, dm = dinitial.to(memory.dtype), (dinitial * memory).sum((-1, -2)).to(m.dtype)
    return *grads, dmemory, dm, None, None, None


mlstm_op.register_autograd(_backward, setup_context=_setup)


def _products(q: Any, v: Any, chunk_size: int) -> tuple[int, int, int]:
    """FLOPs of the three kinds of matmul: products (L, D, L), values (L, L, E + 1), memory (L, D, E + 1)."""
    batch, length, heads, channels = q
    columns = v[3] + 1
    size = min(chunk_size, length)
    tokens = 2 * batch * heads * size * ((length + size - 1) // size)
    return tokens * size * channels, tokens * size * columns, tokens * channels * columns


@flop_formula("mlstm")
def flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    products, values, memory = _products(q, v, args[-1])
    return products + values + 2 * memory


@flop_formula("mlstm_backward")
def backward_flops(dy: Any, dfinal: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    products, values, memory = _products(q, v, args[-1])
    # Products again, dq and dk from them; dv and their gradient; of memories, and dq, dk, dv from them.
    return 3 * products + 2 * values + 4 * memory


def _one_by_one(
    tensors: tuple[Tensor, ...],
    initial_state: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Packed documents each in a row of its own, for the sake of their states."""
    flat = [x.flatten(0, 1).unsqueeze(0) for x in tensors]
    ys, memories, ms = [], [], []
    for i, (start, end) in enumerate(document_bounds(cu_seqlens)):
        state = (None, None) if initial_state is None else tuple(x[i : i + 1] for x in initial_state)
        y, memory, m, *_ = mlstm_op(*(x[:, start:end] for x in flat), *state, None, scale, chunk_size)
        ys.append(y[0])
        memories.append(memory)
        ms.append(m)
    return torch.cat(ys).view(tensors[2].shape), (torch.cat(memories), torch.cat(ms))


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    scale: float,
    initial_state: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Shapes as in the public function."""
    tensors = (q, k, v, igate, fgate)
    if cu_seqlens is not None and (initial_state is not None or with_final_state):
        return _one_by_one(tensors, initial_state, cu_seqlens, scale, chunk_size)
    segments = None if cu_seqlens is None else segment_ids(cu_seqlens, q.shape[0], q.shape[1])
    memory, m = (None, None) if initial_state is None else initial_state
    y, memory, m, *_ = mlstm_op(*tensors, memory, m, segments, scale, chunk_size)
    return y, (memory, m)
