"""The chunked matmul form as a registered operator; saves its inputs and the state before each chunk.

B batch, T length, L chunk size, K chunks in all, H heads, D key dim, E value dim, docs packed documents.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.gated_linear_attention import chunks
from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.segments import segment_ids


@define("gated_linear_attention")
def gated_linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, E), final states (B | docs, H, D, E), states before each chunk (rows, K/rows, H, D, E)."""
    return chunks.forward(q, k, v, g, bonus, initial_state, cu_seqlens, scale, chunk_size)


@gated_linear_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, *heads_and_dim = q.shape
    state = (*heads_and_dim, v.shape[3])
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = statistics_dtype(q, k, v, g)
    kept = chunks.chunk_bound(batch, length, documents, chunk_size)
    final = q.new_empty(batch if documents is None else documents, *state, dtype=dtype)
    return v.new_empty(v.shape), final, q.new_empty(*kept, *state, dtype=dtype)


@define("gated_linear_attention_backward")
def gated_linear_attention_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, bonus (empty where there is none) and the initial state."""
    *grads, dbonus, dinitial = chunks.backward(
        dy, dfinal, q, k, v, g, bonus, states, cu_seqlens, scale, chunk_size
    )
    dq, dk, dv, dg = grads
    return dq, dk, dv, dg, q.new_empty(0) if dbonus is None else dbonus, dinitial


@gated_linear_attention_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbonus = q.new_empty(0) if bonus is None else bonus.new_empty(bonus.shape)
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
    return dq, dk, dv, dg, dbonus, states.new_empty(documents, *states.shape[2:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, bonus, initial_state, cu_seqlens, ctx.scale, ctx.chunk_size = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, bonus, output[2], cu_seqlens)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, bonus, states, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    *grads, dbonus, dinitial = gated_linear_attention_backward_op(
        dy, dfinal, q, k, v, g, bonus, states, cu_seqlens, ctx.scale, ctx.chunk_size
    )
    dbonus = None if bonus is None else dbonus
    dinitial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return *grads, dbonus, dinitial, None, None, None


gated_linear_attention_op.register_autograd(_backward, setup_context=_setup)


def _products(q: Any, v: Any, g: Any, chunk_size: int) -> tuple[int, int, int, int, int]:
    """Of one kind of matmul each, for rows that are not packed: N L and the FLOPs of scores, of the sums of
    pairs that g is part of, of weights (L, L, E) and of states (L, D, E)."""
    batch, length, heads, dim = q
    size = chunks.chunk_length(chunk_size, length)
    tokens = batch * heads * size * -(-length // size)
    per_channel = len(g) == 4
    # Levels: s times L/2s blocks of (s, D, s), for s = 1, 2, ... L/2.
    scores = tokens * dim * (size - 1 if per_channel else 2 * size)
    return tokens, scores, size, 2 * tokens * size * v[3], 2 * tokens * dim * v[3]


@flop_formula("gated_linear_attention")
def _flops(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    bonus: Any,
    initial: Any,
    cu_seqlens: Any,
    scale: float,
    chunk_size: int,
    **kwargs: Any,
) -> int:
    _, scores, _, weights, states = _products(q, v, g, chunk_size)
    return scores + weights + 2 * states


@flop_formula("gated_linear_attention_backward")
def _flops_backward(
    dy: Any,
    dfinal: Any,
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    bonus: Any,
    states: Any,
    cu_seqlens: Any,
    scale: float,
    chunk_size: int,
    **kwargs: Any,
) -> int:
    tokens, scores, size, weights, state = _products(q, v, g, chunk_size)
    if len(g) == 4:
        # Scores again, dq and dk from them; sums for dg, of the odd and but for s = 1 of the even windows.
        inside = 3 * scores + tokens * q[3] * (size - 1 + max(size - 2, 0))
        return inside + 4 * tokens * size * q[3] + 2 * weights + 4 * state
    # Scores twice, dq and dk; the sums for dg of (L, L) pairs and of one column for each end.
    return 4 * scores + 2 * tokens * size * (size + 2) + 2 * weights + 4 * state


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    bonus: Tensor | None = None,
    scale: float,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; bonus (H, D) chooses the exclusive form at the head of chunks.py."""
    if g.dim() == 1:
        g = g.expand(q.shape[:3])
    if cu_seqlens is not None and bonus is None and initial_state is None and not return_final_state:
        g, cu_seqlens = _forget_between(g, cu_seqlens), None
    y, final_state, _ = gated_linear_attention_op(
        q, k, v, g, bonus, initial_state, cu_seqlens, scale, chunk_size
    )
    return y, final_state


def _forget_between(g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """g with a decay of 0 at the first token of each document: packing for nothing, where no state is asked
    for and each token reads after it has forgotten (the exclusive form reads before)."""
    ids = segment_ids(cu_seqlens, g.shape[0], g.shape[1])
    first = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0))
    return g.masked_fill(first.view(*first.shape, *(1,) * (g.dim() - 2)), float("-inf"))


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
    """Arguments as of the reference."""
    return attend(q, k, v, g, **options)
