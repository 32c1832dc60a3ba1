"""The selective scan in Triton: how its kernels are launched, and their registration.

B batch, T length, D channels, N state per channel, docs packed documents. Sums over tokens, rows and channels
are made of partial sums in a fixed order: no atomics, so a result does not depend on luck.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype
from triptych.kernels.linear_recurrence.triton import three_bits
from triptych.kernels.segments import segment_ids
from triptych.kernels.selective_scan.triton_kernels import backward_kernel, forward_kernel
from triptych.kernels.triton_launch import accumulator, launch, power_of_2

BLOCK = 32
"""Channels of a program, one a thread."""
FORWARD_TOKENS = 16
BACKWARD_TOKENS = 8
"""Tokens of a tile, as registers allow."""
PROGRAMS = 1024
"""As many keep a GPU busy; a row is cut into parts until there are."""


class Plan:
    """How a call is cut into programs: a function of its shapes only."""

    def __init__(self, x: Tensor, states: int, chunk_size: int, tokens: int, dtype: torch.dtype) -> None:
        self.batch, self.length, self.channels = x.shape
        self.states, self.dtype, self.device = states, dtype, x.device
        self.block = min(BLOCK, power_of_2(self.channels, 1))
        self.tokens = min(tokens, power_of_2(self.length, 1), power_of_2(chunk_size, 1))
        self.columns = triton.cdiv(self.channels, self.block)
        # Chunks are whole tiles of either direction.
        self.chunk = chunk_tokens(self.length, chunk_size)
        self.chunks = triton.cdiv(self.length, self.chunk)
        parts = max(1, min(triton.cdiv(PROGRAMS, self.batch * self.columns), self.chunks // 4))
        self.part_chunks = three_bits(triton.cdiv(self.chunks, parts))
        self.parts = triton.cdiv(self.chunks, self.part_chunks)
        self.programs = self.batch * self.parts * self.columns

    def run(self, kernel: Any, tensors: tuple[Any, ...], sizes: tuple[int, ...], **options: Any) -> None:
        """Launch: first for the summaries of parts, if there are several, then for the results."""
        parts = self.parts if self.parts > 1 else 0
        shape = (self.batch, parts, self.states, self.channels)
        summaries = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2)]
        for summary in (True, False) if parts else (False,):
            launch(
                kernel,
                (self.programs,),
                *tensors,
                *summaries,
                self.length,
                self.columns,
                self.chunks,
                *sizes,
                **options,
                D=self.channels,
                N=self.states,
                SUMMARY=summary,
                PARTS=self.parts,
                PART_CHUNKS=self.part_chunks,
                CHUNK_TILES=self.chunk // self.tokens,
                ACC=accumulator(self.dtype),
                STATES=power_of_2(self.states, 1),
                TOKENS=self.tokens,
                BLOCK=self.block,
                num_warps=1,
            )


def chunk_tokens(length: int, chunk_size: int) -> int:
    """Tokens between two states that are kept: chunk_size, or the power of two above it."""
    return power_of_2(min(length, chunk_size), 1)


def _rows(x: Tensor) -> Tensor:
    """x with its channels side by side in memory; its rows may be any distance apart."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _states(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(docs, D, N) as the kernels have it, (docs, N, D)."""
    return None if state is None else state.to(dtype).transpose(1, 2).contiguous()


def _documents(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    return None if cu_seqlens is None else segment_ids(cu_seqlens, x.shape[0], x.shape[1])


def _binary_logs(a: Tensor, dtype: torch.dtype) -> Tensor:
    """a (N, D) for exp2."""
    return a.to(dtype).t().contiguous() * math.log2(math.e)


@define("selective_scan_triton")
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
    """y (B, T, D), final states (B or docs, D, N), states before each chunk (B, chunks, N, D)."""
    dtype = statistics_dtype(x, dt, a)
    x, dt = _rows(x), _rows(dt)
    z = None if z is None else _rows(z)
    plan = Plan(x, a.shape[1], chunk_size, FORWARD_TOKENS, dtype)
    y = x.new_empty(x.shape)
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty(count, a.shape[1], a.shape[0], dtype=dtype)
    saved = x.new_empty(x.shape[0], plan.chunks, a.shape[1], a.shape[0], dtype=dtype)
    tensors = (x, dt, _binary_logs(a, dtype), b.contiguous(), c.contiguous(), d, z, dt_bias)
    plan.run(
        forward_kernel,
        (*tensors, _states(initial_state, dtype), _documents(cu_seqlens, x), y, final_state, saved),
        (x.stride(0), dt.stride(0), 0 if z is None else z.stride(0)),
        X_STRIDE=x.stride(1),
        DT_STRIDE=dt.stride(1),
        Z_STRIDE=0 if z is None else z.stride(1),
        SOFTPLUS=softplus,
        PACKED=cu_seqlens is not None,
    )
    return y, final_state.transpose(1, 2).contiguous(), saved


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
    dtype = statistics_dtype(x, dt, a)
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = chunk_tokens(x.shape[1], chunk_size)
    saved = x.new_empty(x.shape[0], (x.shape[1] + size - 1) // size, a.shape[1], a.shape[0], dtype=dtype)
    return x.new_empty(x.shape), x.new_empty(count, *a.shape, dtype=dtype), saved


@define("selective_scan_triton_backward")
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
    saved: Tensor,
    cu_seqlens: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d, z, dt_bias (empty where one is missing) and the initial state."""
    dtype = saved.dtype
    dy, x, dt = _rows(dy), _rows(x), _rows(dt)
    z = None if z is None else _rows(z)
    channels, state = a.shape
    plan = Plan(x, state, chunk_size, BACKWARD_TOKENS, dtype)
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    da = saved.new_empty(x.shape[0], plan.parts, state, channels)
    db, dc = (saved.new_empty(plan.columns, x.shape[0], state, x.shape[1]) for _ in range(2))
    dd, dbias = (saved.new_empty(x.shape[0], plan.parts, channels) for _ in range(2))
    dinitial = saved.new_empty(count, state, channels)
    scratch = saved.new_empty(plan.programs, plan.chunk // plan.tokens, state, plan.block)
    tensors = (x, dt, _binary_logs(a, dtype), b.contiguous(), c.contiguous(), d, z, dt_bias)
    plan.run(
        backward_kernel,
        (
            *(dy, _states(dfinal, dtype), *tensors),
            *(_states(initial_state, dtype), _documents(cu_seqlens, x), saved),
            *(dx, ddt, dz, da, db, dc, dd, dbias, dinitial, scratch),
        ),
        (x.shape[0], dy.stride(0), x.stride(0), dt.stride(0), 0 if z is None else z.stride(0)),
        DY_STRIDE=dy.stride(1),
        X_STRIDE=x.stride(1),
        DT_STRIDE=dt.stride(1),
        Z_STRIDE=0 if z is None else z.stride(1),
        SOFTPLUS=softplus,
        PACKED=cu_seqlens is not None,
    )
    return (
        dx,
        ddt,
        da.sum((0, 1)).t().to(a.dtype).contiguous(),
        db.sum(0).transpose(1, 2).to(b.dtype).contiguous(),
        dc.sum(0).transpose(1, 2).to(c.dtype).contiguous(),
        a.new_empty(0) if d is None else dd.sum((0, 1)).to(d.dtype),
        dz,
        a.new_empty(0) if dt_bias is None else dbias.sum((0, 1)).to(dt_bias.dtype),
        dinitial.transpose(1, 2).contiguous(),
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
    saved: Tensor,
    cu_seqlens: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx, ddt, da, db, dc = (v.new_empty(v.shape) for v in (x, dt, a, b, c))
    dd, dbias = (a.new_empty(0) if v is None else v.new_empty(v.shape) for v in (d, dt_bias))
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    return dx, ddt, da, db, dc, dd, dz, dbias, saved.new_empty(count, *a.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, ctx.softplus, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, saved, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = selective_scan_backward_op(dy, dfinal, *tensors, saved, cu_seqlens, ctx.softplus, ctx.chunk_size)
    given = [None if v is None else grad.to(v.dtype) for v, grad in zip(tensors, grads)]
    return *given, None, None, None


selective_scan_op.register_autograd(_backward, setup_context=_setup)


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
