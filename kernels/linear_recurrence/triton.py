"""The linear recurrence in Triton: one pass over memory where there are channels enough, else two.

B batch, T length, D channels, docs documents. A program takes some channels of a row and walks along a part
of its tokens, a tile (tokens, channels) at a time. Within a tile a thread goes from token to token by itself.
    h[t] = a[t] h[t-1] + b[t]                                              forward, t ascending
    g[t] = dh[t] + a[t+1] g[t+1],  db[t] = g[t],  da[t] = g[t] h[t-1]       backward, t descending
A row is one part if its channels alone keep a GPU busy. Otherwise a first launch finds of every part the
product of its decays and the state it ends with from zero, and each program begins by carrying those of the
parts before its own. A document's first token takes the initial state, its last one the gradient of the final
state.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.standard import _sum_combine as add

from triptych.kernels.library import define
from triptych.kernels.linear_recurrence.torch import fake_backward, fake_forward, register_backward
from triptych.kernels.segments import segment_ids
from triptych.kernels.triton_launch import accumulator, launch, power_of_2

FORWARD_TILES = (16, 5)
BACKWARD_TILES = (8, 8)
"""Tokens of a tile, and tiles on their way from memory at a time: tokens as registers allow, and some 10 KB
a program on their way, so that four programs of a multiprocessor keep its share of the bandwidth busy."""
PROGRAMS = 512
"""As many keep a GPU busy; a row is cut into parts until there are."""


@triton.jit
def walk(decay, value, state, TOKENS: tl.constexpr, REVERSE: tl.constexpr = False):
    """The recurrence within a tile (tokens, channels): all states, and the last.

    A thread holds all tokens of its channels, so that a row of the tile is a register: what is written as a
    choice among rows costs nothing.
    """
    rows = tl.arange(0, TOKENS)[:, None]
    states = value
    for i in tl.static_range(TOKENS):
        now = rows == (TOKENS - 1 - i if REVERSE else i)
        # tl.sum, but many times faster in Triton's interpreter.
        a = tl.reduce(tl.where(now, decay, 0.0), 0, add)
        b = tl.reduce(tl.where(now, value, 0.0), 0, add)
        state = a * state + b
        states = tl.where(now, state[None, :], states)
    return states, state


@triton.jit
def place(columns, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Row, part of the row and channels of this program."""
    program = tl.program_id(0).to(tl.int64)
    channels = (program % columns * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    return program // columns // PARTS, program // columns % PARTS, channels


@triton.jit
def lines(pointer, row, row_stride, token, steps, channels, STRIDE: tl.constexpr, VECTOR: tl.constexpr):
    """Addresses of a tile: the tokens `token + steps` of a row, STRIDE apart.

    The constant stride makes all addresses of a thread one pointer and constants. That row_stride comes in
    units of VECTOR and is not known before limits the alignment the compiler can count on: a thread gets
    VECTOR neighbouring channels of all tokens of the tile, and so walks along them without any other thread.
    """
    return (
        pointer + row * row_stride * VECTOR + token * STRIDE + ((steps * STRIDE)[:, None] + channels[None, :])
    )


@triton.jit
def carried(state, ends, products, row, part, channels, inside, D: tl.constexpr, PARTS: tl.constexpr):
    """The state ahead of a part, from that ahead of the row's first part."""
    for before in range(PARTS - 1):
        at = (row * PARTS + before) * D + channels
        passed = inside & (before < part)
        end = tl.load(ends + at, mask=passed, other=0.0)
        state = end + tl.load(products + at, mask=passed, other=1.0) * state
    return state


@triton.jit(do_not_specialize=["a_row", "b_row", "h_row"])
def forward_kernel(
    a,
    b,
    first,
    docs,
    h,
    final,
    ends,
    products,
    T,
    columns,
    a_row,
    b_row,
    h_row,
    D: tl.constexpr,
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    LOG: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    SUMMARY: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row, part, channels = place(columns, PARTS, BLOCK)
    inside = channels < D
    state = tl.zeros((BLOCK,), ACC)
    if INITIAL and not PACKED and not SUMMARY:
        state += tl.load(first + row * D + channels, mask=inside, other=0.0)
    if PARTS > 1 and not SUMMARY:
        state = carried(state, ends, products, row, part, channels, inside, D, PARTS)
    total = tl.full((BLOCK,), 1.0, ACC)
    steps = tl.arange(0, TOKENS)
    begin = part * (TILES * TOKENS)
    stop = tl.minimum(begin + TILES * TOKENS, T)
    for tile in tl.range(TILES, num_stages=STAGES):
        token = begin + tile * TOKENS
        t = token + steps
        here = (t < stop)[:, None] & inside[None, :]
        # Past the end: h = 1 h + 0.
        at_a = lines(a, row, a_row, token, steps, channels, A_STRIDE, VECTOR)
        at_b = lines(b, row, b_row, token, steps, channels, B_STRIDE, VECTOR)
        decay = tl.load(at_a, mask=here, other=0.0 if LOG else 1.0).to(ACC)
        value = tl.load(at_b, mask=here, other=0.0).to(ACC)
        if LOG:
            decay = tl.exp(decay)
        if PACKED:
            known = t < stop
            doc = tl.load(docs + row * T + t, mask=known, other=0).to(tl.int64)
            doc_before = tl.load(docs + row * T + t - 1, mask=known & (t > 0), other=-1)
            doc_after = tl.load(docs + row * T + t + 1, mask=known & (t + 1 < T), other=-1)
            begins = (known & (doc != doc_before))[:, None]
            of_doc = doc[:, None] * D + channels[None, :]
            if INITIAL:
                value += decay * tl.load(first + of_doc, mask=begins & here, other=0.0)
            decay = tl.where(begins, 0.0, decay)
        values, state = walk(decay, value, state, TOKENS)
        if SUMMARY:
            _, total = walk(decay, decay * 0.0, total, TOKENS)
        else:
            at_h = lines(h, row, h_row, token, steps, channels, D, VECTOR)
            tl.store(at_h, values, mask=here)
            if PACKED:
                tl.store(final + of_doc, values, mask=here & (doc != doc_after)[:, None])
    if SUMMARY:
        at = (row * PARTS + part) * D + channels
        tl.store(ends + at, state, mask=inside)
        tl.store(products + at, total, mask=inside)
    elif not PACKED:
        tl.store(final + row * D + channels, state, mask=inside & (stop == T))


@triton.jit(do_not_specialize=["dh_row", "a_row", "h_row"])
def backward_kernel(
    dh,
    dfinal,
    a,
    h,
    first,
    docs,
    da,
    db,
    dfirst,
    ends,
    products,
    T,
    columns,
    dh_row,
    a_row,
    h_row,
    D: tl.constexpr,
    DH_STRIDE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    LOG: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    SUMMARY: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row, part, channels = place(columns, PARTS, BLOCK)
    inside = channels < D
    state = tl.zeros((BLOCK,), ACC)
    if FINAL and not PACKED and not SUMMARY:
        state += tl.load(dfinal + row * D + channels, mask=inside, other=0.0)
    if PARTS > 1 and not SUMMARY:
        state = carried(state, ends, products, row, part, channels, inside, D, PARTS)
    total = tl.full((BLOCK,), 1.0, ACC)
    steps = tl.arange(0, TOKENS)
    begin = part * (TILES * TOKENS)
    stop = tl.minimum(begin + TILES * TOKENS, T)
    for tile in tl.range(TILES, num_stages=STAGES):
        token = T - 1 - begin - tile * TOKENS
        t = token - steps
        known = t > T - 1 - stop
        here = known[:, None] & inside[None, :]
        # The decay of the token after: 1 after the last one, so that the final state's gradient passes.
        at_after = lines(a, row, a_row, token + 1, -steps, channels, A_STRIDE, VECTOR)
        at_dh = lines(dh, row, dh_row, token, -steps, channels, DH_STRIDE, VECTOR)
        decay = tl.load(at_after, mask=here & (t + 1 < T)[:, None], other=0.0 if LOG else 1.0).to(ACC)
        value = tl.load(at_dh, mask=here, other=0.0).to(ACC)
        if not SUMMARY:
            at_before = lines(h, row, h_row, token - 1, -steps, channels, D, VECTOR)
            before = tl.load(at_before, mask=here & (t > 0)[:, None], other=0.0).to(ACC)
        if LOG:
            decay = tl.exp(decay)
        if PACKED:
            doc = tl.load(docs + row * T + t, mask=known, other=0).to(tl.int64)
            doc_before = tl.load(docs + row * T + t - 1, mask=known & (t > 0), other=-1)
            doc_after = tl.load(docs + row * T + t + 1, mask=known & (t + 1 < T), other=-1)
            finishes = (known & (doc != doc_after))[:, None]
            of_doc = doc[:, None] * D + channels[None, :]
            if FINAL:
                value += tl.load(dfinal + of_doc, mask=finishes & here, other=0.0)
            decay = tl.where(finishes, 0.0, decay)
        g, state = walk(decay, value, state, TOKENS)
        if SUMMARY:
            _, total = walk(decay, decay * 0.0, total, TOKENS)
        else:
            tl.store(lines(db, row, h_row, token, -steps, channels, D, VECTOR), g, mask=here)
            at_a = lines(a, row, a_row, token, -steps, channels, A_STRIDE, VECTOR)
            begins = known & (t == 0)
            if PACKED:
                begins = known & (doc != doc_before)
                before = tl.where(begins[:, None], 0.0, before)
            else:
                of_doc = row * D + channels[None, :] + tl.zeros((TOKENS, 1), tl.int64)
            if INITIAL:
                # Of the tokens that begin a document; others load and store nothing.
                opening = here & begins[:, None]
                before += tl.load(first + of_doc, mask=opening, other=0.0)
                own = tl.load(at_a, mask=opening, other=0.0).to(ACC)
                tl.store(dfirst + of_doc, g * (tl.exp(own) if LOG else own), mask=opening)
            slope = g * before
            if LOG:
                slope *= tl.exp(tl.load(at_a, mask=here, other=0.0).to(ACC))
            tl.store(lines(da, row, h_row, token, -steps, channels, D, VECTOR), slope, mask=here)
    if SUMMARY:
        at_part = (row * PARTS + part) * D + channels
        tl.store(ends + at_part, state, mask=inside)
        tl.store(products + at_part, total, mask=inside)


def three_bits(n: int) -> int:
    """n rounded up to three significant bits: a kernel is compiled for each number of tiles."""
    unit = 1 << max(0, n.bit_length() - 3)
    return triton.cdiv(n, unit) * unit


class Plan:
    """How a call is cut into programs: a function of its shapes and dtypes only."""

    def __init__(self, tiles: tuple[int, int], x: Tensor, *narrow: Tensor) -> None:
        self.batch, self.length, self.channels = x.shape
        wide = any(y.element_size() > 2 for y in (x, *narrow))
        strides = [y.stride(i) for y in (x, *narrow) for i in range(2)]
        # Threads read at least 4 bytes where addresses allow.
        self.vector = 1 if wide or any(n % 2 for n in strides) else 2
        self.block = min(32 * self.vector, power_of_2(self.channels, 1))
        self.tokens = min(tiles[0], power_of_2(self.length, 1))
        self.stages = tiles[1]
        self.columns = triton.cdiv(self.channels, self.block)
        wanted = triton.cdiv(PROGRAMS, self.batch * self.columns)
        # A part is worth its two reads only if it is longer than what is on its way at the start.
        parts = max(1, min(wanted, self.length // (2 * self.stages * self.tokens)))
        self.tiles = three_bits(triton.cdiv(triton.cdiv(self.length, parts), self.tokens))
        self.parts = triton.cdiv(self.length, self.tiles * self.tokens)

    def run(self, kernel: Any, tensors: tuple[Any, ...], rows: tuple[int, ...], **options: Any) -> None:
        """Launch: first for the summaries of parts, if there are several, then for the results."""
        x = tensors[0]
        dtype = options.pop("dtype")
        summaries = [
            torch.empty(
                self.batch, self.parts if self.parts > 1 else 0, self.channels, dtype=dtype, device=x.device
            )
            for _ in range(2)
        ]
        grid = (self.batch * self.parts * self.columns,)
        units = [row // self.vector for row in rows]
        for summary in (True, False) if self.parts > 1 else (False,):
            launch(
                kernel,
                grid,
                *tensors,
                *summaries,
                self.length,
                self.columns,
                *units,
                **options,
                D=self.channels,
                VECTOR=self.vector,
                SUMMARY=summary,
                PARTS=self.parts,
                TILES=self.tiles,
                ACC=accumulator(dtype),
                TOKENS=self.tokens,
                BLOCK=self.block,
                STAGES=self.stages,
                num_warps=1,
            )


def _rows(x: Tensor) -> Tensor:
    """x with its channels side by side in memory; its rows may be any distance apart."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _documents(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    return None if cu_seqlens is None else segment_ids(cu_seqlens, x.shape[0], x.shape[1])


@define("linear_recurrence_triton")
def linear_recurrence_op(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) of b's dtype, final states (B or docs, D)."""
    a, b = _rows(a), _rows(b)
    h, final = fake_forward(a, b, initial_state, cu_seqlens, log_decay, chunk_size)
    first = None if initial_state is None else initial_state.to(final.dtype).contiguous()
    plan = Plan(FORWARD_TILES, h, a, b)
    plan.run(
        forward_kernel,
        (a, b, first, _documents(cu_seqlens, b), h, final),
        (a.stride(0), b.stride(0), h.stride(0)),
        A_STRIDE=a.stride(1),
        B_STRIDE=b.stride(1),
        LOG=log_decay,
        PACKED=cu_seqlens is not None,
        INITIAL=first is not None,
        dtype=final.dtype,
    )
    return h, final


linear_recurrence_op.register_fake(fake_forward)


@define("linear_recurrence_triton_backward")
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
    """Gradients of a, b and the initial states (those in fp32, fp64; empty memory where there are none)."""
    dh, a, h = _rows(dh), _rows(a), h.contiguous()
    da, db, dinitial = fake_backward(dh, dfinal, a, h, initial_state, cu_seqlens, log_decay, chunk_size)
    first, last_ = (None if s is None else s.to(dinitial.dtype).contiguous() for s in (initial_state, dfinal))
    plan = Plan(BACKWARD_TILES, h, dh, a)
    plan.run(
        backward_kernel,
        (dh, last_, a, h, first, _documents(cu_seqlens, h), da, db, dinitial),
        (dh.stride(0), a.stride(0), h.stride(0)),
        DH_STRIDE=dh.stride(1),
        A_STRIDE=a.stride(1),
        LOG=log_decay,
        PACKED=cu_seqlens is not None,
        INITIAL=first is not None,
        FINAL=last_ is not None,
        dtype=dinitial.dtype,
    )
    return da, db, dinitial


linear_recurrence_backward_op.register_fake(fake_backward)
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
    """Shapes as in the public function; chunk_size has no meaning here."""
    return linear_recurrence_op(a, b, initial_state, cu_seqlens, log_decay, chunk_size)
