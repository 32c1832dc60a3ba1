"""The linear recurrence as plain functions on tensors, forward and backward: what the custom ops run.

B batch, T length, D channels, docs documents, S tokens of a chunk, C chunks of a block.

A token after the other would be T operations on (B, D), most of them overhead. A block is therefore cut into
C chunks whose tokens are worked on together, (B, C, D) at a time, in two passes over S tokens:
    1. every chunk from a state of zero, with the product of its decays: the state after it is
       end + product * state before it, which a loop over chunks carries on;
    2. the recurrence itself, every chunk from its own state.
Nothing is divided, so decays may be zero, negative or tiny. A block is small enough to stay in a CPU's cache
between the passes. Where (B, D) alone is large there is one chunk, and no first pass.
Backward is the same recurrence against time, g[t] = dh[t] + a[t+1] g[t+1]:  db = g, da[t] = g[t] h[t-1].
A document's first token takes its initial state for h[t-1], its last one the gradient of its final state.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds

# Elements that one operation should work on: more than its overhead, and few enough for a CPU's cache.
STEP_ELEMENTS = {"cpu": 1 << 16}
STEP_ELEMENTS_ELSEWHERE = 1 << 20


class Marks(NamedTuple):
    """Some tokens of a block, of one document each."""

    rows: Tensor
    tokens: Tensor
    """Place within the block."""
    docs: Tensor
    by_step: dict[int, tuple[Tensor, Tensor, Tensor]]
    """Rows, chunks and documents of those at one place within their chunk."""


class Block(NamedTuple):
    """A run of tokens of all rows."""

    start: int
    stop: int
    chunks: int
    starts: Marks
    ends: Marks

    def steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C * S, D) -> S views (B, C, D)."""
        return x.unflatten(1, (self.chunks, -1)).unbind(2)


def _marks(bounds: list[int], batch: int, length: int, start: int, stop: int, size: int, shift: int) -> Marks:
    """The documents whose bound, moved by `shift`, is one of the tokens [start, stop) of a row."""
    found = []
    for row in range(batch):
        low, high = (row * length + edge - shift for edge in (start, stop))
        for doc in range(bisect.bisect_left(bounds, low), bisect.bisect_left(bounds, high)):
            found.append((row, bounds[doc] - low, doc))
    by_step: dict[int, list[tuple[int, int, int]]] = {}
    for row, token, doc in found:
        by_step.setdefault(token % size, []).append((row, token // size, doc))
    rows, tokens, docs = torch.tensor(found, dtype=torch.int64).view(-1, 3).unbind(1)
    columns = {step: tuple(torch.tensor(marks).unbind(1)) for step, marks in by_step.items()}
    return Marks(rows, tokens, docs, columns)  # type: ignore[arg-type]


def cut(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> list[Block]:
    """The blocks of x (B, T, D), in order. A row is a document where there is no cu_seqlens."""
    batch, length, channels = x.shape
    if cu_seqlens is None:
        bounds = [(row * length, (row + 1) * length) for row in range(batch)]
    else:
        bounds = document_bounds(cu_seqlens)
    firsts, lasts = [start for start, _ in bounds], [stop - 1 for _, stop in bounds]
    limit = STEP_ELEMENTS.get(x.device.type, STEP_ELEMENTS_ELSEWHERE)
    chunks = max(1, limit // (batch * channels))
    blocks, start = [], 0
    while start < length:
        # The last tokens: as many whole chunks as there are, then what remains as one.
        size = min(chunk_size, length - start)
        count = min(chunks, (length - start) // size)
        stop = start + count * size
        edges = (_marks(b, batch, length, start, stop, size, 0) for b in (firsts, lasts))
        blocks.append(Block(start, stop, count, *edges))
        start = stop
    return blocks


def forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) and the state after each row or document (B or docs, D)."""
    dtype = statistics_dtype(a, b)
    h = b.new_empty(b.shape)
    count = b.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    first = b.new_zeros(count, b.shape[2], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    final_state = torch.empty_like(first)
    state = b.new_zeros(b.shape[0], b.shape[2], dtype=dtype)
    for block in cut(b, cu_seqlens, chunk_size):
        where = slice(block.start, block.stop)
        out = h[:, where] if h.dtype == dtype else b.new_empty(b[:, where].shape, dtype=dtype)
        _forward_block(
            block, _decays(a[:, where], dtype, log_decay), b[:, where].to(dtype), state, first, out
        )
        if out.dtype != h.dtype:
            h[:, where] = out
        state = out[:, -1]
        final_state[block.ends.docs] = out[block.ends.rows, block.ends.tokens]
    return h, final_state


def _decays(a: Tensor, dtype: torch.dtype, log_decay: bool) -> Tensor:
    return a.to(dtype).exp() if log_decay else a.to(dtype)


def _forward_block(block: Block, a: Tensor, b: Tensor, before: Tensor, first: Tensor, h: Tensor) -> None:
    """Write h of a block; before: the state (B, D) ahead of it; first: the documents' initial states."""
    a_, b_, h_ = (block.steps(x) for x in (a, b, h))
    starts = block.starts.by_step.items()
    begins = {
        t: (rows, chunks, b_[t][rows, chunks] + a_[t][rows, chunks] * first[docs])
        for t, (rows, chunks, docs) in starts
    }
    state = before.unsqueeze(1)
    if block.chunks > 1:
        end, product = b_[0].clone(), a_[0].clone()
        for t in range(len(a_)):
            if t:
                torch.addcmul(b_[t], a_[t], end, out=end)
                product.mul_(a_[t])
            if t in begins:
                rows, chunks, begin = begins[t]
                end[rows, chunks], product[rows, chunks] = begin, 0.0
        state = torch.empty_like(end)
        states, ends, products = (x.unbind(1) for x in (state, end, product))
        states[0].copy_(before)
        for c in range(block.chunks - 1):
            torch.addcmul(ends[c], products[c], states[c], out=states[c + 1])
    for t in range(len(a_)):
        torch.addcmul(b_[t], a_[t], state, out=h_[t])
        if t in begins:
            rows, chunks, begin = begins[t]
            h_[t][rows, chunks] = begin
        state = h_[t]


def backward(
    dh: Tensor,
    dfinal: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial states."""
    dtype = statistics_dtype(a, h)
    da, db = a.new_empty(a.shape), h.new_empty(h.shape)
    count = h.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    first = h.new_zeros(count, h.shape[2], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    last = torch.zeros_like(first) if dfinal is None else dfinal.to(dtype)
    dinitial = torch.empty_like(first)
    after = h.new_zeros(h.shape[0], h.shape[2], dtype=dtype)
    for block in reversed(cut(h, cu_seqlens, chunk_size)):
        where = slice(block.start, block.stop)
        decay = _decays(a[:, where], dtype, log_decay)
        g = db[:, where] if db.dtype == dtype else h.new_empty(h[:, where].shape, dtype=dtype)
        after = _backward_block(block, decay, dh[:, where].to(dtype), after, last, g)
        if g.dtype != db.dtype:
            db[:, where] = g
        # The first tokens of documents are put right below.
        wide = da[:, where] if da.dtype == dtype else h.new_empty(g.shape, dtype=dtype)
        torch.mul(g[:, 1:], h[:, block.start : block.stop - 1], out=wide[:, 1:])
        torch.mul(g[:, 0], h[:, max(block.start - 1, 0)], out=wide[:, 0])
        rows, tokens, docs = block.starts[:3]
        begin = g[rows, tokens]
        wide[rows, tokens] = begin * first[docs]
        dinitial[docs] = begin * decay[rows, tokens]
        if log_decay:
            wide.mul_(decay)
        if wide.dtype != da.dtype:
            da[:, where] = wide
    return da, db, dinitial


def _backward_block(block: Block, a: Tensor, dh: Tensor, after: Tensor, last: Tensor, g: Tensor) -> Tensor:
    """Write g of a block; after: what reaches its last token from later ones (B, D); last: the gradients of
    final states. Returns what reaches the last token before the block."""
    a_, dh_, g_ = (block.steps(x) for x in (a, dh, g))
    ends = block.ends.by_step.items()
    begins = {t: (rows, chunks, dh_[t][rows, chunks] + last[docs]) for t, (rows, chunks, docs) in ends}
    state = after.unsqueeze(1)
    if block.chunks > 1:
        end, product = dh_[-1].clone(), torch.ones_like(dh_[-1])
        for t in reversed(range(len(a_))):
            if t + 1 < len(a_):
                torch.addcmul(dh_[t], a_[t + 1], end, out=end)
                product.mul_(a_[t + 1])
            if t in begins:
                rows, chunks, begin = begins[t]
                end[rows, chunks], product[rows, chunks] = begin, 0.0
        end.mul_(a_[0])
        product.mul_(a_[0])
        state = torch.empty_like(end)
        states, ends_, products = (x.unbind(1) for x in (state, end, product))
        states[-1].copy_(after)
        for c in reversed(range(1, block.chunks)):
            torch.addcmul(ends_[c], products[c], states[c], out=states[c - 1])
    for t in reversed(range(len(a_))):
        if t + 1 < len(a_):
            torch.addcmul(dh_[t], a_[t + 1], g_[t + 1], out=g_[t])
        else:
            torch.add(dh_[t], state, out=g_[t])
        if t in begins:
            rows, chunks, begin = begins[t]
            g_[t][rows, chunks] = begin
    return a_[0][:, 0] * g_[0][:, 0]
