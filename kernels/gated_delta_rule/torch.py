"""The chunked matmul form of the gated delta rule as a registered operator. It saves its inputs, the state
before each chunk and the inverse of each chunk's triangular system: beside the inputs K H (D E + L^2) numbers
of fp32.

B batch, T length, L chunk size, K chunks of all documents, docs documents, H heads, D channels of queries and
keys, E channels of values.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.gated_delta_rule import scan
from triptych.kernels.gated_delta_rule.chunks import bound_of_chunks
from triptych.kernels.library import define, flop_formula, statistics_dtype


@define("gated_delta_rule")
def gated_delta_rule_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What scan.Outputs has."""
    return scan.forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size, normalize)


@gated_delta_rule_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, channels = q.shape
    size = min(chunk_size, length)
    room = bound_of_chunks(batch, length, size, cu_seqlens)
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = q.new_empty(0, dtype=statistics_dtype(q, v, g, beta))
    final_state = wide.new_empty(documents, heads, channels, v.shape[3])
    states = wide.new_empty(room, heads, channels, v.shape[3])
    return v.new_empty(v.shape), final_state, states, wide.new_empty(room, heads, size, size)


@define("gated_delta_rule_backward")
def gated_delta_rule_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    inverses: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What scan.Gradients has."""
    args = (q, k, v, g, beta, states, inverses, cu_seqlens, scale, chunk_size, normalize)
    return scan.backward(dy, dfinal, *args)


@gated_delta_rule_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    inverses: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
    return dq, dk, dv, dg, dbeta, states.new_empty(documents, *states.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, initial_state, cu_seqlens, *ctx.options = inputs
    _, _, states, inverses = output
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(states, inverses)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, beta, states, inverses, cu_seqlens)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, beta, states, inverses, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    *grads, dinitial = gated_delta_rule_backward_op(
        dy, dfinal, q, k, v, g, beta, states, inverses, cu_seqlens, *ctx.options
    )
    dstate = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return *grads, dstate, None, None, None, None


gated_delta_rule_op.register_autograd(_backward, setup_context=_setup)


def _products(q: Any, v: Any, cu_seqlens: Any, size: int) -> tuple[int, int, int, int]:
    """FLOPs of the kinds of matmul: scores (L, D, L), writes (L, L, E), states (L, D, E), decays (L, L, L).

    Of packed documents as if they filled all their chunks but one each by half: shapes tell no more.
    """
    batch, length, heads, channels = q
    size = min(size, length)
    chunks = batch * ((length + size - 1) // size)
    if cu_seqlens is not None:
        chunks = (batch * length + (cu_seqlens[0] - 1) * (size // 2)) // size
    tokens = 2 * chunks * size * heads
    return (
        tokens * channels * size,
        tokens * size * v[3],
        tokens * channels * v[3],
        tokens * size * size,
    )


@flop_formula("gated_delta_rule")
def flops(
    q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any, cu_seqlens: Any, *options: Any, **kwargs: Any
) -> int:
    """Of the op's shapes; the Triton form counts the same."""
    scores, writes, states, _ = _products(q, v, cu_seqlens, options[1])
    # Scores and similarities; writes and what they give outputs; recalled, written, read. Solving is not
    # counted.
    return 2 * scores + 2 * writes + 3 * states


@flop_formula("gated_delta_rule_backward")
def backward_flops(
    dy: Any,
    dfinal: Any,
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    states: Any,
    inverses: Any,
    cu_seqlens: Any,
    *options: Any,
    **kwargs: Any,
) -> int:
    scores, writes, state, decays = _products(q, v, cu_seqlens, options[1])
    # Scores twice and similarities again, dq and dk (twice) from them; writes again, dw, z and the gradients
    # of scores and similarities; recalled again, dw, from outputs, the state's own, dq, dk (twice).
    return 6 * scores + 5 * writes + 7 * state + decays


def chunk_of_packed(chunk_size: int, tokens: int, documents: int) -> int:
    """Half of chunk_size, down to 32, while half a chunk of padding for each document is more than a tenth of
    all tokens."""
    while chunk_size >= 64 and 5 * documents * chunk_size > tokens:
        chunk_size //= 2
    return chunk_size


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    normalize: bool,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    if g is None:
        g = torch.zeros(beta.shape, dtype=statistics_dtype(q, v, beta), device=q.device)
    if cu_seqlens is not None:
        chunk_size = chunk_of_packed(chunk_size, q.shape[0] * q.shape[1], cu_seqlens.shape[0] - 1)
    y, final_state, *_ = gated_delta_rule_op(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size, normalize
    )
    return y, final_state
