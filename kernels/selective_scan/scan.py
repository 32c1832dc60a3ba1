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
        starts: Tensor | None,
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
        self.starts = None if starts is None else starts[rows].t()[..., None, None]
        # Reused for every block: fresh memory would cost more than the arithmetic.
        shape = (min(size, x.shape[1]), *self.xdt.shape[1:2], *self.a.shape)
        self.decay, self.h = (torch.empty(shape, dtype=dtype, device=x.device) for _ in range(2))
        self.decays, self.hs = self.decay.unbind(0), self.h.unbind(0)

    def blocks(self) -> list[slice]:
        """Runs of tokens, in order."""
        size, length = len(self.decays), self.x.shape[0]
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def run(self, block: slice, before: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states (S, R, N, W) of a block; before: the state (R, N, W) ahead of it."""
        count = block.stop - block.start
        decay, h = self.decay[:count], self.h[:count]
        torch.mul(self.dt[block].unsqueeze(2), self.a_log2, out=decay).exp2_()
        if self.starts is not None:
            decay.masked_fill_(self.starts[block], 0.0)
        outer(self.b[block], self.xdt[block], out=h)
        self.hs[0].addcmul_(self.decays[0], before)
        for t in range(1, count):
            self.hs[t].addcmul_(self.decays[t], self.hs[t - 1])
        return decay, h

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
    starts: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D), the last state (B, D, N) and the states before each block (B, blocks, N, D).

    starts: bool (B, T), true where a document begins.
    """
    batch, length, channels = x.shape
    dtype, state = statistics_dtype(x, dt, a), a.shape[1]
    y = x.new_empty(x.shape)
    final_state = x.new_empty(batch, channels, state, dtype=dtype)
    blocks = -(-length // min(chunk_size, length))
    states = x.new_empty(batch, blocks, state, channels, dtype=dtype)
    for rows, cut in _tiles(x, state):
        tile = _Tile(rows, cut, x, dt, a, b, c, d, z, dt_bias, starts, softplus, chunk_size)
        h = torch.zeros_like(tile.h[0])
        if initial_state is not None:
            h.copy_(initial_state[rows, cut].transpose(1, 2))
        for k, block in enumerate(tile.blocks()):
            states[rows, k, :, cut] = h
            _, hs = tile.run(block, h)
            h.copy_(hs[-1])
            out = gated(tile.outputs(block, hs), None if tile.z is None else tile.z[block])
            y[rows, block, cut] = out.transpose(0, 1).to(y.dtype)
        final_state[rows, cut] = h.transpose(1, 2)
    return y, final_state, states


class Gradients:
    """Gradients of the inputs, filled tile by tile; those that several tiles add to are in the wide dtype."""

    def __init__(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor | None, states: Tensor
    ) -> None:
        self.x, self.dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        self.z = None if z is None else z.new_empty(z.shape)
        self.b, self.c = (torch.zeros(b.shape, dtype=states.dtype, device=x.device) for _ in range(2))
        self.a = states.new_zeros(states.shape[2:])  # (N, D)
        self.d, self.dt_bias = (states.new_zeros(x.shape[2]) for _ in range(2))
        self.initial = states.new_empty(x.shape[0], *a.shape)


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
    states: Tensor,
    starts: Tensor | None,
    softplus: bool,
    chunk_size: int,
) -> Gradients:
    """Gradients of all inputs from those of y and the final state."""
    grads = Gradients(x, dt, a, b, c, z, states)
    for rows, cut in _tiles(x, a.shape[1]):
        tile = _Tile(rows, cut, x, dt, a, b, c, d, z, dt_bias, starts, softplus, chunk_size)
        # Slope of the softplus, (T, R, W): 1 - exp(-s).
        slope = -torch.expm1(-tile.dt) if softplus else None
        g = torch.empty_like(tile.h)
        carry = torch.zeros_like(g[0])
        if dfinal is not None:
            carry.copy_(dfinal[rows, cut].transpose(1, 2))
        for k, block in reversed(list(enumerate(tile.blocks()))):
            dy_ = dy[rows, block, cut].transpose(0, 1).to(g.dtype)
            _backward_block(tile, block, states[rows, k, :, cut], dy_, slope, g, carry, grads)
        grads.initial[rows, cut] = carry.transpose(1, 2)
    return grads


def _backward_block(
    tile: _Tile,
    block: slice,
    before: Tensor,
    dy: Tensor,
    slope: Tensor | None,
    g: Tensor,
    carry: Tensor,
    grads: Gradients,
) -> None:
    """One block. carry: gradient of its last state (R, N, W) from what follows; becomes that of `before`.

    g: a buffer like tile.h.
    """
    rows, cut = tile.rows, tile.channels
    decay, h = tile.run(block, before)
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
