"""The selective scan as plain functions on tensors, forward and backward: what the custom ops run.

B batch, T length, S tokens of a block, D channels, N state per channel. A tile is some rows (R) and channels
(W) of the batch, small enough that one token's states stay in a CPU's cache.

The recurrence is run as it stands, a token after the other, so every decay is safe and nothing is divided.
What makes it fast: exponentials and outer products are taken for a block of tokens at once, so that a token
costs a single multiply-add over its states; sums over channels or states are matrix products of the block.
States are laid out (T, R, N, W): their long dimension, the channels, lies innermost. Forward keeps the state
before each block, backward computes those within a block again:
    g[t] = c[t] dy[t] + exp(s[t+1] a) g[t+1]                            gradient of h[t]
    db[t] = sum_channels g[t] s[t] x[t],  dc[t] = sum_channels h[t] dy[t],  d(s x)[t] = sum_states g[t] b[t]
    dlog[t] = exp(s[t] a) g[t] h[t-1],    ds[t] = sum_states dlog[t] a,     da = sum_tokens dlog[t] s[t].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds

# States of one token that are worked on at a time: on a CPU few enough that a block of 32 stays in its cache.
STEP_ELEMENTS = {"cpu": 1 << 14}
STEP_ELEMENTS_ELSEWHERE = 1 << 24


def time_step(dt: Tensor, dt_bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """s = softplus(dt + dt_bias) in `dtype`, or dt + dt_bias."""
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def gated(y: Tensor, z: Tensor | None) -> Tensor:
    """y silu(z) in y's dtype; y where there is no z."""
    return y if z is None else y * F.silu(z.to(y.dtype))


Marks = dict[int, list[tuple[int, int, int]]]
"""Of each block, by number: row, place within the block, and document of the tokens that are marked."""


def mark_documents(
    x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, size: int
) -> tuple[Marks, Marks]:
    """First and last tokens of documents; a row is one without cu_seqlens, its first token then no matter
    where there is no initial state."""
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        bounds = [(row * length, (row + 1) * length) for row in range(batch)]
    else:
        bounds = document_bounds(cu_seqlens)
    firsts: Marks = {}
    lasts: Marks = {}
    for marks, edges in ((firsts, [b[0] for b in bounds]), (lasts, [b[1] - 1 for b in bounds])):
        if marks is firsts and cu_seqlens is None and initial_state is None:
            continue
        for doc, edge in enumerate(edges):
            row, token = divmod(edge, length)
            marks.setdefault(token // size, []).append((row, token % size, doc))
    return firsts, lasts


class _Tile:
    """The inputs of some rows and channels, time first and in the dtype of states, and buffers of a block."""

    def __init__(
        self,
        rows: slice,
        channels: slice,
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
        size: int,
    ) -> None:
        dtype = statistics_dtype(x, dt, a)
        self.rows, self.channels = rows, channels
        bias = None if dt_bias is None else dt_bias[channels]
        self.x, self.b, self.c = (
            v.transpose(0, 1).to(dtype) for v in (x[rows, :, channels], b[rows], c[rows])
        )
        self.dt = time_step(dt[rows, :, channels].transpose(0, 1), bias, softplus, dtype).contiguous()
        self.xdt = self.x * self.dt  # (T, R, W)
        self.z = None if z is None else z[rows, :, channels].transpose(0, 1).to(dtype)
        self.d = None if d is None else d[channels].to(dtype)
        self.a = a[channels].to(dtype).t().contiguous()  # (N, W)
        # exp2 is some three times as fast as exp on a CPU, and does not slow down where it underflows.
        self.a_log2 = self.a * math.log2(math.e)
        size = min(size, x.shape[1])
        self.firsts, self.lasts = mark_documents(x, initial_state, cu_seqlens, size)
        self.initial = None if initial_state is None else initial_state[:, channels].to(dtype)
        # Reused for every block: fresh memory would cost more than the arithmetic.
        shape = (size, *self.xdt.shape[1:2], *self.a.shape)
        self.decay, self.h = (torch.empty(shape, dtype=dtype, device=x.device) for _ in range(2))
        self.decays, self.hs = self.decay.unbind(0), self.h.unbind(0)

    def blocks(self) -> list[slice]:
        """Runs of tokens, in order."""
        size, length = len(self.decays), self.x.shape[0]
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def marked(self, marks: Marks, block: slice) -> list[tuple[tuple[int, int], int]]:
        """(place within the block, row within the tile) and document of the tokens in this tile."""
        found = marks.get(block.start // len(self.decays), ())
        rows = range(self.rows.start, self.rows.stop)
        return [((t, row - self.rows.start), doc) for row, t, doc in found if row in rows]

    def run(self, block: slice, before: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Decays and states (S, R, N, W) of a block; before: the state (R, N, W) ahead of it.

        The decays of documents' first tokens are 0; what they are for the initial states comes apart.
        """
        count = block.stop - block.start
        decay, h = self.decay[:count], self.h[:count]
        torch.mul(self.dt[block].unsqueeze(2), self.a_log2, out=decay).exp2_()
        outer(self.b[block], self.xdt[block], out=h)
        opening = []
        for at, doc in self.marked(self.firsts, block):
            opening.append(decay[at].clone())
            decay[at] = 0.0
            if self.initial is not None:
                h[at].addcmul_(opening[-1], self.initial[doc].t())
        self.hs[0].addcmul_(self.decays[0], before)
        for t in range(1, count):
            self.hs[t].addcmul_(self.decays[t], self.hs[t - 1])
        return decay, h, opening

    def outputs(self, block: slice, h: Tensor) -> Tensor:
        """c.h + d x of a block, (S, R, W)."""
        y = sum_states(self.c[block], h)
        return y if self.d is None else y.addcmul_(self.x[block], self.d)


def outer(states: Tensor, channels: Tensor, out: Tensor) -> None:
    """(S, R, N) and (S, R, W) -> (S, R, N, W)."""
    torch.mul(states.unsqueeze(-1), channels.unsqueeze(2), out=out)


def sum_states(weights: Tensor, values: Tensor) -> Tensor:
    """Weights (S, R, N), values (S, R, N, W) -> their sum over N, (S, R, W)."""
    return torch.matmul(weights.unsqueeze(2), values).squeeze(2)


def sum_channels(values: Tensor, weights: Tensor) -> Tensor:
    """Values (S, R, N, W), weights (S, R, W) -> their sum over W, (S, R, N)."""
    # As row times matrix: matrix times column is several times slower in batches.
    return torch.matmul(weights.unsqueeze(2), values.transpose(2, 3)).squeeze(2)


def _tiles(x: Tensor, state: int) -> Iterator[tuple[slice, slice]]:
    """Rows and channels of each tile."""
    batch, _, channels = x.shape
    limit = STEP_ELEMENTS.get(x.device.type, STEP_ELEMENTS_ELSEWHERE)
    parts = -(-state * channels // limit)
    width = -(-channels // parts)
    rows = max(1, limit // (state * width))
    for row, channel in itertools.product(range(0, batch, rows), range(0, channels, width)):
        yield slice(row, min(row + rows, batch)), slice(channel, min(channel + width, channels))


def forward(
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
    """y (B, T, D), last states (B or docs, D, N) and the states before each block (B, blocks, N, D)."""
    batch, length, channels = x.shape
    dtype, state = statistics_dtype(x, dt, a), a.shape[1]
    y = x.new_empty(x.shape)
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty(count, channels, state, dtype=dtype)
    blocks = -(-length // min(chunk_size, length))
    states = x.new_empty(batch, blocks, state, channels, dtype=dtype)
    for rows, cut in _tiles(x, state):
        tile = _Tile(
            rows, cut, x, dt, a, b, c, d, z, dt_bias, initial_state, cu_seqlens, softplus, chunk_size
        )
        h = torch.zeros_like(tile.h[0])
        for k, block in enumerate(tile.blocks()):
            states[rows, k, :, cut] = h
            _, hs, _ = tile.run(block, h)
            for at, doc in tile.marked(tile.lasts, block):
                final_state[doc, cut] = hs[at].t()
            h.copy_(hs[-1])
            out = gated(tile.outputs(block, hs), None if tile.z is None else tile.z[block])
            y[rows, block, cut] = out.transpose(0, 1).to(y.dtype)
    return y, final_state, states


class Gradients:
    """Gradients of the inputs, filled tile by tile; those that several tiles add to are in the wide dtype."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        z: Tensor | None,
        initial_state: Tensor | None,
        states: Tensor,
    ) -> None:
        self.x, self.dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        self.z = None if z is None else z.new_empty(z.shape)
        self.b, self.c = (torch.zeros(b.shape, dtype=states.dtype, device=x.device) for _ in range(2))
        self.a = states.new_zeros(states.shape[2:])  # (N, D)
        self.d, self.dt_bias = (states.new_zeros(x.shape[2]) for _ in range(2))
        self.initial = states.new_empty(0 if initial_state is None else initial_state.shape)


def backward(
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
    states: Tensor,
    cu_seqlens: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> Gradients:
    """Gradients of all inputs from those of y and the final state."""
    grads = Gradients(x, dt, a, b, c, z, initial_state, states)
    for rows, cut in _tiles(x, a.shape[1]):
        tile = _Tile(
            rows, cut, x, dt, a, b, c, d, z, dt_bias, initial_state, cu_seqlens, softplus, chunk_size
        )
        dlast = None if dfinal is None else dfinal[:, cut].to(states.dtype)
        # Slope of the softplus, (T, R, W): 1 - exp(-s).
        slope = -torch.expm1(-tile.dt) if softplus else None
        g = torch.empty_like(tile.h)
        carry = torch.zeros_like(g[0])
        for k, block in reversed(list(enumerate(tile.blocks()))):
            dy_ = dy[rows, block, cut].transpose(0, 1).to(g.dtype)
            _backward_block(tile, block, states[rows, k, :, cut], dy_, dlast, slope, g, carry, grads)
    return grads


def _backward_block(
    tile: _Tile,
    block: slice,
    before: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    slope: Tensor | None,
    g: Tensor,
    carry: Tensor,
    grads: Gradients,
) -> None:
    """One block. carry: gradient of its last state (R, N, W) from what follows; becomes that of `before`.

    dlast: gradients of the documents' last states, (docs, W, N). g: a buffer like tile.h.
    """
    rows, cut = tile.rows, tile.channels
    decay, h, opening = tile.run(block, before)
    if tile.z is not None and grads.z is not None:
        z = tile.z[block]
        dz = torch.ops.aten.silu_backward(dy * tile.outputs(block, h), z)
        grads.z[rows, block, cut] = dz.transpose(0, 1).to(grads.z.dtype)
        dy = gated(dy, z)
    grads.c[rows, block] += sum_channels(h, dy).transpose(0, 1)
    g = g[: len(h)]
    outer(tile.c[block], dy, out=g)
    gs = g.unbind(0)
    gs[-1].add_(carry)
    if dlast is not None:
        for at, doc in tile.marked(tile.lasts, block):
            g[at] += dlast[doc].t()
    for t in reversed(range(1, len(gs))):
        gs[t - 1].addcmul_(tile.decays[t], gs[t])
    torch.mul(decay[0], gs[0], out=carry)
    x, dt = tile.x[block], tile.dt[block]
    grads.b[rows, block] += sum_channels(g, tile.xdt[block]).transpose(0, 1)
    dxdt = sum_states(tile.b[block], g)
    # dlog, in place of the decays; then two sums of it, in place of g and h.
    dlog = decay.mul_(g)
    dlog[0].mul_(before)
    dlog[1:].mul_(h[:-1])
    if tile.initial is not None:
        for (at, doc), factor in zip(tile.marked(tile.firsts, block), opening):
            dinitial = factor.mul_(g[at])
            grads.initial[doc, cut] = dinitial.t()
            torch.mul(dinitial, tile.initial[doc].t(), out=dlog[at])
    grads.a[:, cut] += torch.mul(dlog, dt.unsqueeze(2), out=g).sum((0, 1))
    ds = torch.mul(dlog, tile.a, out=h).sum(2).addcmul_(dxdt, x)
    ds = ds if slope is None else ds.mul_(slope[block])
    dx = dxdt.mul_(dt)
    if tile.d is not None:
        grads.d[cut] += (dy * x).sum((0, 1))
        dx.addcmul_(dy, tile.d)
    grads.dt_bias[cut] += ds.sum((0, 1))
    grads.dt[rows, block, cut] = ds.transpose(0, 1).to(grads.dt.dtype)
    grads.x[rows, block, cut] = dx.transpose(0, 1).to(grads.x.dtype)
