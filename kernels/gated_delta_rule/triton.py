"""The gated delta rule in Triton. It saves its inputs and, in v's dtype, L numbers per token and head (the
inverses of the chunks' triangular systems); backward finds the states again.

B batch, T length, L chunk size, docs documents, H heads, D channels of queries and keys, E channels of
values.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from triptych.kernels.gated_delta_rule import triton_kernels as kernels
from triptych.kernels.gated_delta_rule.chunks import bound_of_chunks
from triptych.kernels.gated_delta_rule.torch import backward_flops, flops
from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.triton_launch import accumulator, dot_precision, launch, power_of_2

WIDE = 64
"""Columns of a state that one program carries from chunk to chunk; half of it where programs are few."""
ENOUGH = 264
"""Programs that are enough: two for each multiprocessor of an H100."""


@dataclass(frozen=True)
class Plan:
    """How a call is cut: numbers for the kernels, and where the chunks of packed documents are."""

    batch: int
    length: int
    heads: int
    channels: int
    values: int
    size: int  # L
    chunks: int  # room for chunks
    count: int  # documents
    cu_seqlens: Tensor | None
    first_chunks: Tensor | None  # (docs,): the first chunk of each document
    documents: Tensor | None  # (chunks,): the document of each chunk; those to spare lie behind the last one

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Constants of every kernel."""
        return {
            "L": self.size,
            "BD": power_of_2(self.channels),
            "PACKED": self.cu_seqlens is not None,
            "ACC": accumulator(dtype),
            "PRECISION": dot_precision(dtype),
        }

    @property
    def chunk_tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.cu_seqlens, self.first_chunks, self.documents

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.length, self.heads, self.channels, self.values

    def scan_columns(self) -> int:
        """BE of the kernels that walk from chunk to chunk."""
        programs = self.count * self.heads * triton.cdiv(self.values, WIDE)
        return min(power_of_2(self.values), WIDE if programs >= ENOUGH else WIDE // 2)

    def programs(self, of: int, columns: int) -> tuple[int]:
        return (of * self.heads * triton.cdiv(self.values, columns),)


def chunk_length(chunk_size: int, length: int, channels: int) -> int:
    """L: a power of two from 16 to 64 (32 for large heads), as near chunk_size as may be."""
    largest = 64 if channels <= 128 else 32
    return min(largest, power_of_2(length), max(16, 1 << (chunk_size.bit_length() - 1)))


def make_plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Plan:
    """Made on the device from cu_seqlens, without reading it."""
    batch, length, heads, channels = q.shape
    size = chunk_length(chunk_size, length, channels)
    room = bound_of_chunks(batch, length, size, cu_seqlens)
    shape = (batch, length, heads, channels, v.shape[3], size, room)
    if cu_seqlens is None:
        return Plan(*shape, batch, None, None, None)
    chunks = (cu_seqlens.diff() + (size - 1)) // size
    ends = chunks.cumsum(0)
    numbers = torch.arange(room, device=q.device, dtype=ends.dtype)
    documents = torch.searchsorted(ends, numbers, right=True).clamp_max_(len(chunks) - 1)
    return Plan(*shape, len(chunks), cu_seqlens, ends - chunks, documents)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _states(
    p: Plan,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    inverses: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The state before each chunk (chunks, H, D, E) and w (B, T, H, E), both in v's dtype."""
    states = v.new_empty(p.chunks, p.heads, p.channels, p.values)
    w = torch.empty_like(v)
    columns = p.scan_columns()
    tensors = (k, v, g, beta, inverses, initial_state, states, w, final_state, p.cu_seqlens, p.first_chunks)
    launch(
        kernels.states_kernel,
        p.programs(p.count, columns),
        *tensors,
        *p.sizes,
        **p.options(v.dtype),
        NORMALIZE=normalize,
        BE=columns,
        HAS_INITIAL=initial_state is not None,
        HAS_FINAL=final_state is not None,
    )
    return states, w


@define("gated_delta_rule_triton")
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
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, E), the final state (docs, H, D, E) and the inverses (B, T, H, L)."""
    q, k, v, g, beta = _contiguous(q, k, v, g, beta)
    initial_state = None if initial_state is None else initial_state.contiguous()
    p = make_plan(q, v, cu_seqlens, chunk_size)
    options = {**p.options(v.dtype), "NORMALIZE": normalize}
    inverses = v.new_empty(*v.shape[:3], p.size)
    launch(
        kernels.inverses_kernel,
        (p.chunks * p.heads,),
        *(k, g, beta, inverses, *p.chunk_tables),
        *(p.length, p.heads, p.channels),
        **options,
        EXACT="ieee" if v.dtype == torch.float64 else "tf32x3",
        num_warps=8,
    )
    wide = statistics_dtype(q, v, g, beta)
    final_state = v.new_empty(p.count, p.heads, p.channels, p.values, dtype=wide)
    states, w = _states(p, k, v, g, beta, inverses, initial_state, final_state, normalize)
    y = torch.empty_like(v)
    columns = min(128, power_of_2(p.values))
    launch(
        kernels.outputs_kernel,
        p.programs(p.chunks, columns),
        *(q, k, g, states, w, y, *p.chunk_tables, scale, *p.sizes),
        **options,
        BE=columns,
    )
    return y, final_state, inverses


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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, channels = q.shape
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = statistics_dtype(q, v, g, beta)
    final_state = v.new_empty(documents, heads, channels, v.shape[3], dtype=wide)
    size = chunk_length(chunk_size, length, channels)
    return v.new_empty(v.shape), final_state, v.new_empty(batch, length, heads, size)


@define("gated_delta_rule_triton_backward")
def gated_delta_rule_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    inverses: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    q, k, v, g, beta, dy = _contiguous(q, k, v, g, beta, dy)
    initial_state = None if initial_state is None else initial_state.contiguous()
    p = make_plan(q, v, cu_seqlens, chunk_size)
    options = {**p.options(v.dtype), "NORMALIZE": normalize}
    states, w = _states(p, k, v, g, beta, inverses, initial_state, None, normalize)
    z = torch.empty_like(v)
    columns = min(128, power_of_2(p.values))
    launch(
        kernels.writes_gradients_kernel,
        p.programs(p.chunks, columns),
        *(q, k, g, dy, z, *p.chunk_tables, scale, *p.sizes),
        **options,
        BE=columns,
    )
    wide = statistics_dtype(q, v, g, beta)
    dinitial = v.new_empty(p.count, p.heads, p.channels, p.values, dtype=wide)
    dstates = torch.empty_like(states)
    columns = p.scan_columns()
    dfinal = None if dfinal is None else dfinal.contiguous()
    launch(
        kernels.states_gradients_kernel,
        p.programs(p.count, columns),
        *(q, k, g, beta, inverses, dy, dfinal, z, dstates, dinitial, p.cu_seqlens, p.first_chunks),
        *(scale, *p.sizes),
        **options,
        BE=columns,
        HAS_FINAL=dfinal is not None,
    )
    dq, dk, dv, dg, dbeta = (torch.empty_like(x) for x in (q, k, v, g, beta))
    launch(
        kernels.gradients_kernel,
        (p.chunks * p.heads,),
        *(q, k, v, g, beta, states, dstates, w, z, dy, dq, dk, dv, dg, dbeta, *p.chunk_tables),
        *(scale, *p.sizes),
        **options,
        BE=min(power_of_2(p.values), 64 if v.dtype.itemsize == 2 else 32),
        num_warps=8,
    )
    return dq, dk, dv, dg, dbeta, dinitial


@gated_delta_rule_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    inverses: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
    wide = statistics_dtype(q, v, g, beta)
    return dq, dk, dv, dg, dbeta, v.new_empty(documents, *q.shape[2:], v.shape[3], dtype=wide)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, initial_state, cu_seqlens, *ctx.options = inputs
    inverses = output[2]
    ctx.mark_non_differentiable(inverses)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, beta, initial_state, inverses, cu_seqlens)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, beta, initial_state, inverses, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    *grads, dinitial = gated_delta_rule_backward_op(
        dy, dfinal, q, k, v, g, beta, initial_state, inverses, cu_seqlens, *ctx.options
    )
    dstate = None if initial_state is None else dinitial.to(initial_state.dtype)
    return *grads, dstate, None, None, None, None


gated_delta_rule_op.register_autograd(_backward, setup_context=_setup)
flop_formula("gated_delta_rule_triton")(flops)
flop_formula("gated_delta_rule_triton_backward")(backward_flops)


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
    y, final_state, _ = gated_delta_rule_op(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size, normalize
    )
    return y, final_state
