"""WKV in linear time as plain functions on tensors, forward and backward: what the custom op runs.

B batch, T length, L tokens of a chunk, n chunks of a row, C channels. A tile is some rows (R) and channels
(W) of the batch, laid out (L, R, n, W).

Every sum here is one of weights 2^(log weight) that decay with the distance, kept as 2^m s with a running
maximum m of the log weights, so that no exponential is above 1. A *sweep* carries such sums over the tokens
in one direction and leaves at each the sums of those before it:
    m[t+1] = max(m[t] - w, k[t]),    s[t+1] = 2^(m[t] - w - m[t+1]) s[t] + 2^(k[t] - m[t+1]) v[t].
Within a chunk m[t] + t w and k[t] + t w are compared instead, which rounds once and not at every step.
All chunks step at once, after a short pass over chunks has found what each of them begins with.

Backward sweeps the outputs in the same way. With y[t] = num[t] / den[t], the gradient of v[i] is the sum over
t of dy[t] times the share of i in y[t]: weights that decay with |t - i| again, from log weights -log den[t].
The gradient of k[i] has v[i] - y[t] in it, that of w the product of both kinds of sweep.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype

LOG2_E = math.log2(math.e)
# Values of a tile: bounds the memory of its sums, and keeps a step's share of them in a CPU's cache.
TILE_ELEMENTS = {"cpu": 1 << 20}
TILE_ELEMENTS_ELSEWHERE = 1 << 26
# Log weight of the tokens that fill up the last chunk: beside any real one it vanishes.
NOTHING = -1e30


Values = Sequence[Tensor | None]
"""What is summed; None stands for ones."""


@dataclass
class Sums:
    """2^top times each of `values`; top is -inf where nothing has been summed."""

    top: Tensor
    values: list[Tensor]

    def at(self, index: int | tuple[slice | int, ...]) -> Sums:
        return Sums(self.top[index], [value[index] for value in self.values])


def add(sums: Sums, log: Tensor, values: Values, out: Sums) -> None:
    """out = sums + 2^log times values."""
    torch.maximum(sums.top, log, out=out.top)
    old, new = (torch.sub(x, out.top).exp2_() for x in (sums.top, log))
    for kept, value, target in zip(sums.values, values, out.values):
        if value is None:
            torch.addcmul(new, kept, old, out=target)
        else:
            torch.mul(kept, old, out=target).addcmul_(value, new)


class Tile:
    """How a tile is cut into chunks, with its decays and the borders of its documents.

    w: per step, to base 2, (R | 1, T | 1, W). starts, ends: bool (R, T), first and last tokens of documents.
    """

    def __init__(
        self, w: Tensor, starts: Tensor | None, ends: Tensor | None, rows: int, length: int, size: int
    ) -> None:
        self.rows, self.length, self.size = rows, length, min(size, length)
        self.chunks = -(-length // self.size)
        self.padding = self.chunks * self.size - length
        # (L | 1, R | 1, n | 1, W)
        self.w = self.cut(w) if w.shape[1] > 1 else w.unsqueeze(0)
        self.resets = {False: self._cut_mask(starts), True: self._cut_mask(ends)}

    def cut(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(R, T, W) -> (L, R, n, W)."""
        x = F.pad(x, (0, 0, 0, self.padding), value=fill) if self.padding else x
        return x.reshape(x.shape[0], self.chunks, self.size, x.shape[2]).permute(2, 0, 1, 3).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """(L, R, n, W) -> (R, T, W)."""
        return x.permute(1, 2, 0, 3).reshape(x.shape[1], -1, x.shape[3])[:, : self.length]

    def _cut_mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else self.cut(mask.unsqueeze(-1).float()).bool()

    def sweep(
        self, log: Tensor, values: Values, *, reverse: bool, first: Sums | None = None
    ) -> tuple[Sums, Sums]:
        """Sums over the tokens before each token (behind it, if reverse) and over all of them.

        log: log weights (L, R, n, W), to base 2. first: what the sweep begins with, (R, W). The sums over all
        count the padding of the last chunk as tokens unless the sweep is reversed.
        """
        # Decays from the chunk's first step on: log weights that are raised by them compare as they are.
        place = torch.arange(self.size, device=log.device, dtype=log.dtype).view(-1, 1, 1, 1)
        place = place.flip(0) if reverse else place
        raised = log + place * self.w
        resets = self.resets[reverse]
        sums = Sums(torch.empty_like(raised), [torch.empty_like(raised) for _ in values])
        steps = range(self.size)[:: -1 if reverse else 1]
        before, last = self._chunk_sums(raised, values, reverse, first)
        sums.top[steps[0]] = before.top
        for target, value in zip(sums.values, before.values):
            target[steps[0]] = value
        for here, following in zip(steps, [*steps[1:], None]):
            if resets is not None:
                sums.top[here].masked_fill_(resets[here], -math.inf)
            if following is not None:
                added = [None if value is None else value[here] for value in values]
                add(sums.at(here), raised[here], added, sums.at(following))
        sums.top.sub_((place - 1) * self.w)
        return sums, last

    def _chunk_sums(
        self, raised: Tensor, values: Values, reverse: bool, first: Sums | None
    ) -> tuple[Sums, Sums]:
        """What each chunk begins with, (R, n, W), its top raised like the first token's, and what there is
        behind the last one, (R, W)."""
        passes = None
        if (resets := self.resets[reverse]) is not None:
            counts = resets.int() if reverse else resets.int().flip(0)
            # Borders between a token and the end of its chunk, those at the token itself left out.
            between = counts.cumsum(0) - counts
            raised = raised.masked_fill((between if reverse else between.flip(0)) > 0, -math.inf)
            passes = counts.sum(0) == 0
        top = raised.amax(0)
        weights = torch.sub(raised, top).exp2_()
        own = [(weights if value is None else weights * value).sum(0) for value in values]
        # From chunk to chunk in fp64: rounding of the top would add up over a long row.
        decay = self.w[-1 if not reverse else 0].double().expand(top.shape)
        own_top = top.double() - (self.size - 1) * decay
        through = self.size * decay
        if passes is not None:
            through = through.masked_fill(~passes, math.inf)
        if first is None:
            empty = torch.full_like(top[:, 0], -math.inf)
            first = Sums(empty, [torch.zeros_like(empty) for _ in values])
        tops, carried = first.top.double(), first.values
        before = Sums(torch.empty_like(top), [torch.empty_like(top) for _ in values])
        enters = self.w[0 if not reverse else -1].expand(top.shape)
        for k in range(self.chunks)[:: -1 if reverse else 1]:
            before.top[:, k] = tops - enters[:, k]
            for target, value in zip(before.values, carried):
                target[:, k] = value
            old = tops - through[:, k]
            tops = torch.maximum(old, own_top[:, k])
            kept, added = ((x - tops).to(top.dtype).exp2_() for x in (old, own_top[:, k]))
            carried = [value * kept + new[:, k] * added for value, new in zip(carried, own)]
        return before, Sums(tops.to(top.dtype), carried)


def tiles(k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and channels of each tile of (B, T, C)."""
    batch, length, channels = k.shape
    limit = TILE_ELEMENTS.get(k.device.type, TILE_ELEMENTS_ELSEWHERE)
    parts = -(-length * channels // limit)
    width = -(-channels // parts)
    rows = max(1, limit // (length * width))
    for row, channel in itertools.product(range(0, batch, rows), range(0, channels, width)):
        yield slice(row, min(row + rows, batch)), slice(channel, min(channel + width, channels))


@dataclass
class Inputs:
    """What the operator is given.

    scale: (B, T), what w is multiplied with to be the decay of a step; None: 1. scale_u: u is, too. starts,
    ends: bool (B, T), first and last tokens of documents; None: a row is one. initial_state: (B, 2, C).
    """

    k: Tensor
    v: Tensor
    w: Tensor
    u: Tensor
    initial_state: Tensor | None
    scale: Tensor | None
    starts: Tensor | None
    ends: Tensor | None
    scale_u: bool
    bidirectional: bool
    chunk_size: int

    @property
    def directions(self) -> tuple[bool, ...]:
        """Values of `reverse` of the sweeps over the inputs."""
        return (False, True) if self.bidirectional else (False,)


class _Outputs:
    """The forward pass of one tile, with all that backward wants of it. Logarithms are to base 2."""

    def __init__(self, inputs: Inputs, rows: slice, channels: slice) -> None:
        k, v = (x[rows, :, channels] for x in (inputs.k, inputs.v))
        dtype = statistics_dtype(inputs.k, inputs.v, inputs.w)
        w, u = (x[channels].to(dtype).view(1, 1, -1) * LOG2_E for x in (inputs.w, inputs.u))
        scale = None if inputs.scale is None else inputs.scale[rows].to(dtype).unsqueeze(-1)
        starts, ends = (None if x is None else x[rows] for x in (inputs.starts, inputs.ends))
        self.tile = Tile(
            w if scale is None else w * scale, starts, ends, k.shape[0], k.shape[1], inputs.chunk_size
        )
        self.k = self.tile.cut(k.to(dtype) * LOG2_E, NOTHING)
        self.v = self.tile.cut(v.to(dtype))
        if inputs.scale_u and scale is not None:
            u = self.tile.cut((u * scale).expand(k.shape))
        self.initial = None
        if inputs.initial_state is not None:
            mean, log = inputs.initial_state[rows, :, channels].to(dtype).unbind(1)
            self.initial = Sums(log * LOG2_E, [mean, torch.ones_like(mean)])
        self.sweeps = {
            reverse: self.tile.sweep(self.k, [self.v, None], reverse=reverse, first=self.initial)[0]
            for reverse in inputs.directions
        }
        self.own = self.k + u
        self._divide()

    def _divide(self) -> None:
        """y and the logarithm of its denominator, (L, R, n, W)."""
        top = self.own
        for sums in self.sweeps.values():
            top = torch.maximum(top, sums.top)
        weight = torch.sub(self.own, top).exp2_()
        numerator = self.v * weight
        denominator = weight
        for sums in self.sweeps.values():
            weight = torch.sub(sums.top, top).exp2_()
            numerator.addcmul_(sums.values[0], weight)
            denominator = denominator.addcmul_(sums.values[1], weight)
        self.y = numerator.div_(denominator)
        self.log = denominator.log2_().add_(top)

    def final(self) -> Sums:
        """Mean and log weight of all tokens, and what they decay from: (R, W)."""
        tile, place = self.tile, (self.tile.length - 1) % self.tile.size
        last: tuple[slice | int, ...] = (place, slice(None), -1)
        before = self.sweeps[False].at(last)
        before = Sums(before.top - tile.w[0, :, -1], before.values)
        sums = Sums(torch.empty_like(before.top), [torch.empty_like(before.top) for _ in before.values])
        add(before, self.k[last], [self.v[last], None], sums)
        return sums


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y (B, T, C) and, unless bidirectional, the final state (B, 2, C)."""
    k, v = inputs.k, inputs.v
    y = v.new_empty(v.shape)
    count = 0 if inputs.bidirectional else k.shape[0]
    final_state = k.new_empty(count, 2, k.shape[2], dtype=statistics_dtype(k, v, inputs.w))
    for rows, channels in tiles(k):
        outputs = _Outputs(inputs, rows, channels)
        y[rows, :, channels] = outputs.tile.join(outputs.y).to(y.dtype)
        if not inputs.bidirectional:
            sums = outputs.final()
            final_state[rows, 0, channels] = sums.values[0] / sums.values[1]
            final_state[rows, 1, channels] = (sums.top + sums.values[1].log2()) / LOG2_E
    return y, final_state


@dataclass
class Gradients:
    """Of k and v (B, T, C), w and u (C,), and the initial state (B, 2, C)."""

    k: Tensor
    v: Tensor
    w: Tensor
    u: Tensor
    initial: Tensor


def backward(dy: Tensor, dfinal: Tensor | None, inputs: Inputs) -> Gradients:
    """Gradients of all inputs from those of y and the final state."""
    k, v, w = inputs.k, inputs.v, inputs.w
    dtype = statistics_dtype(k, v, w)
    dw, du = (torch.zeros(w.shape, dtype=dtype, device=w.device) for _ in range(2))
    initial = k.new_empty(0 if inputs.bidirectional else k.shape[0], 2, k.shape[2], dtype=dtype)
    grads = Gradients(k.new_empty(k.shape), v.new_empty(v.shape), dw, du, initial)
    for rows, channels in tiles(k):
        outputs = _Outputs(inputs, rows, channels)
        final = None if dfinal is None else dfinal[rows, :, channels].to(dtype)
        _backward_tile(inputs, outputs, rows, channels, dy[rows, :, channels].to(dtype), final, grads)
    return grads


def _backward_tile(
    inputs: Inputs,
    outputs: _Outputs,
    rows: slice,
    channels: slice,
    dy: Tensor,
    dfinal: Tensor | None,
    grads: Gradients,
) -> None:
    """Two sums go through the sweeps: of dy, and of dy y."""
    tile, k, v = outputs.tile, outputs.k, outputs.v
    dy = tile.cut(dy)
    values = [dy, dy * outputs.y]
    scale = None if inputs.scale is None else inputs.scale[rows].to(k.dtype).unsqueeze(-1)
    log = tile.cut(tile.join(-outputs.log), NOTHING)
    share = torch.sub(outputs.own, outputs.log).exp2_()
    dv, dlog = (share * value for value in values)
    du = tile.join((v * dv).sub_(dlog))
    grads.u[channels] += (du * scale if inputs.scale_u and scale is not None else du).sum((0, 1))
    dw = torch.zeros_like(du)
    # What a token gave to the outputs behind it is gathered by the reverse sweep, and the other way round.
    for towards, before in outputs.sweeps.items():
        first = None if dfinal is None else _adjoint_of_final(outputs, dfinal)
        after, last = tile.sweep(log, values, reverse=not towards, first=first)
        weight = torch.add(k, after.top).exp2_()
        dv.addcmul_(weight, after.values[0])
        dlog.addcmul_(weight, after.values[1])
        # One step of decay lies between the tokens before a token and the outputs after it.
        between = before.top.add_(after.top).sub_(tile.w).exp2_()
        of_dy, of_dy_y = after.values
        products = before.values[0].mul_(of_dy).addcmul_(before.values[1], of_dy_y, value=-1)
        dw -= tile.join(products.mul_(between))
    if not inputs.bidirectional:
        grads.initial[rows, :, channels] = _gradient_of_initial(outputs.initial, last)
    grads.w[channels] += (dw if scale is None else dw * scale).sum((0, 1))
    grads.v[rows, :, channels] = tile.join(dv).to(grads.v.dtype)
    grads.k[rows, :, channels] = tile.join(dv.mul_(v).sub_(dlog)).to(grads.k.dtype)


def _adjoint_of_final(outputs: _Outputs, dfinal: Tensor) -> Sums:
    """What the gradient of the final state adds to the sums of dy and dy y, ahead of the padding: (R, W)."""
    final, tile = outputs.final(), outputs.tile
    dmean, dlog = dfinal.unbind(1)
    mean = final.values[0] / final.values[1]
    top = -(final.top + final.values[1].log2())
    # The sweep passes the padding first and decays there.
    top = top + tile.padding * tile.w[-1, :, -1]
    return Sums(top.expand(mean.shape).clone(), [dmean, dmean * mean - dlog])


def _gradient_of_initial(initial: Sums | None, last: Sums) -> Tensor:
    """(R, 2, W), from the sums that the reverse sweep ends with."""
    if initial is None:
        return torch.zeros_like(last.top).unsqueeze(1).expand(-1, 2, -1)
    weight = (initial.top + last.top).exp2()
    dmean = weight * last.values[0]
    return torch.stack([dmean, initial.values[0] * dmean - weight * last.values[1]], 1)
