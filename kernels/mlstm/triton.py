"""mLSTM in Triton. It saves its inputs, its output and two numbers per token and head; backward finds the
memories again.

B batch, T length, L chunk size, docs documents, H heads, D channels of queries and keys, E channels of
values.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from triptych.kernels.gated_delta_rule.triton import Plan, make_plan
from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.mlstm import triton_kernels as kernels
from triptych.kernels.mlstm.torch import backward_flops, flops
from triptych.kernels.triton_launch import accumulator, launch, power_of_2

State = tuple[Tensor | None, Tensor | None]
ROWS = 32


def _memories(
    p: Plan, tensors: tuple[Tensor, ...], initial: State, final: State
) -> tuple[Tensor, Tensor, Tensor]:
    """C (chunks, H, D, E) in v's dtype, n (chunks, H, D) and m (chunks, H) before each chunk. tensors: k, v
    and the gates."""
    v = tensors[1]
    wide = torch.promote_types(v.dtype, torch.float32)
    memories = v.new_empty(p.chunks, p.heads, p.channels, p.values)
    normalisers = v.new_empty(memories.shape[:3], dtype=wide)
    ms = v.new_empty(memories.shape[:2], dtype=wide)
    columns = p.scan_columns()
    launch(
        kernels.memories_kernel,
        p.programs(p.count, columns),
        *(*tensors, *initial, memories, normalisers, ms, *final, p.cu_seqlens, p.first_chunks, *p.sizes),
        **p.options(v.dtype),
        BE=columns,
        HAS_INITIAL=initial[0] is not None,
        HAS_FINAL=final[0] is not None,
    )
    return memories, normalisers, ms


@define("mlstm_triton")
def mlstm_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    memory: Tensor | None,
    m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (B, T, H, E), the final memory (docs, H, D, E + 1) and m (docs, H); for backward what y was divided
    by, and how that moves with the normaliser, (B, T, H). memory, m: the initial state."""
    q, k, v, igate, fgate = (x.contiguous() for x in (q, k, v, igate, fgate))
    memory, m = (None if x is None else x.contiguous() for x in (memory, m))
    p = make_plan(q, v, cu_seqlens, chunk_size)
    wide = statistics_dtype(q, v, igate)
    final_memory = v.new_empty(p.count, p.heads, p.channels, p.values + 1, dtype=wide)
    final_m = v.new_empty(p.count, p.heads, dtype=wide)
    states = _memories(p, (k, v, igate, fgate), (memory, m), (final_memory, final_m))
    y = torch.empty_like(v)
    denominators, signs = v.new_empty(igate.shape, dtype=wide), v.new_empty(igate.shape, dtype=torch.int8)
    columns = min(128, power_of_2(p.values))
    info = torch.finfo(wide)
    launch(
        kernels.outputs_kernel,
        p.programs(p.chunks, columns),
        *(q, k, v, igate, fgate, *states, y, denominators, signs, *p.chunk_tables, scale, *p.sizes),
        **p.options(v.dtype),
        BE=columns,
        LOW=info.tiny,
        HIGH=info.max,
    )
    return y, final_memory, final_m, denominators, signs


@mlstm_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    memory: Tensor | None,
    m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, channels = q.shape
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = v.new_empty(0, dtype=statistics_dtype(q, v, igate))
    final_memory = wide.new_empty(documents, heads, channels, v.shape[3] + 1)
    denominators, signs = wide.new_empty(igate.shape), v.new_empty(igate.shape, dtype=torch.int8)
    return v.new_empty(v.shape), final_memory, wide.new_empty(documents, heads), denominators, signs


@define("mlstm_triton_backward")
def mlstm_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    memory: Tensor | None,
    m: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    denominators: Tensor,
    signs: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, igate, fgate and the initial memory."""
    q, k, v, igate, fgate, dy = (x.contiguous() for x in (q, k, v, igate, fgate, dy))
    memory, m, dfinal = (None if x is None else x.contiguous() for x in (memory, m, dfinal))
    p = make_plan(q, v, cu_seqlens, chunk_size)
    options = p.options(v.dtype)
    memories, normalisers, ms = _memories(p, (k, v, igate, fgate), (memory, m), (None, None))
    dsums = torch.empty_like(denominators)
    launch(
        kernels.normalisers_gradients_kernel,
        (triton.cdiv(dsums.numel(), ROWS),),
        *(dy, y, denominators, signs, dsums, dsums.numel(), p.values),
        ROWS=ROWS,
        BE=min(128, power_of_2(p.values)),
        ACC=accumulator(v.dtype),
    )
    dinitial = ms.new_empty(p.count, p.heads, p.channels, p.values + 1)
    dmemories, dnormalisers = torch.empty_like(memories), torch.empty_like(normalisers)
    columns = p.scan_columns()
    launch(
        kernels.memories_gradients_kernel,
        p.programs(p.count, columns),
        *(q, igate, fgate, ms, dy, denominators, dsums, dfinal, dmemories, dnormalisers, dinitial),
        *(p.cu_seqlens, p.first_chunks, scale, *p.sizes),
        **options,
        BE=columns,
        HAS_FINAL=dfinal is not None,
    )
    grads = tuple(torch.empty_like(x) for x in (q, k, v, igate, fgate))
    launch(
        kernels.gradients_kernel,
        (p.chunks * p.heads,),
        *(q, k, v, igate, fgate, memories, normalisers, ms, dy, denominators, dsums, dmemories, dnormalisers),
        *(*grads, *p.chunk_tables, scale, *p.sizes),
        **options,
        BE=min(power_of_2(p.values), 64 if v.dtype.itemsize == 2 else 32),
        num_warps=8,
    )
    dq, dk, dv, digate, dfgate = grads
    return dq, dk, dv, digate, dfgate, dinitial


@mlstm_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    memory: Tensor | None,
    m: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    denominators: Tensor,
    signs: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv, digate, dfgate = (x.new_empty(x.shape) for x in (q, k, v, igate, fgate))
    return dq, dk, dv, digate, dfgate, denominators.new_empty(documents, *q.shape[2:], v.shape[3] + 1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.chunk_size = inputs
    y, _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, y, *others[1:])


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    memory, m = ctx.saved_tensors[5:7]
    if dy is None:
        dy = torch.zeros_like(ctx.saved_tensors[2])
    *grads, dinitial = mlstm_backward_op(dy, dfinal, *ctx.saved_tensors, ctx.scale, ctx.chunk_size)
    dmemory = dm = None
    if memory is not None:
        # A larger m is a larger memory.
        dmemory, dm = dinitial.to(memory.dtype), (dinitial * memory).sum((-1, -2)).to(m.dtype)
    return *grads, dmemory, dm, None, None, None


mlstm_op.register_autograd(_backward, setup_context=_setup)
flop_formula("mlstm_triton")(flops)
flop_formula("mlstm_triton_backward")(backward_flops)


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
    memory, m = (None, None) if initial_state is None else initial_state
    y, memory, m, *_ = mlstm_op(q, k, v, igate, fgate, memory, m, cu_seqlens, scale, chunk_size)
    return y, (memory, m)
