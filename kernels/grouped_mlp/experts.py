"""Forward and backward of experts' feed-forwards, expert by expert or all at once.

A rows sorted by expert, E experts, C channels, F inner channels. counts: int64 (E,).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.grouped_linear.products import (
    add_bias,
    backward_rows,
    bias_gradient,
    forward_rows,
    row_bounds,
    weight_gradient,
)
from triptych.kernels.library import statistics_dtype

aten = torch.ops.aten
Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # of x, up, down, gate, up_bias, gate_bias, down_bias


PIECE_BYTES = 1 << 24
"""On the CPU, what is kept for backward lies in pieces of at most so many bytes. The C library takes blocks
from 32 MiB on from the system each time, which fills them with zeros page by page: 3 to 6 % of a step.
Pieces also bound what lies between the products where one expert gets all rows. Half precision is not cut,
since gradients would be added up in it."""


Space = list[Tensor] | None
"""Tensors to write results into, or None: into new ones."""


def activate(up: Tensor, gate: Tensor | None, space: Space = None) -> Tensor:
    """silu(gate) * up, or gelu(up), computed in fp32 at least, in up's dtype; up (A, F).

    space: one tensor like up, of fp32 or fp64.
    """
    if space is not None:
        (out,) = space
        if gate is None:
            return aten.gelu.out(up, approximate="tanh", out=out)
        return aten.silu.out(gate, out=out).mul_(up)
    wide = statistics_dtype(up)
    if gate is None:
        return F.gelu(up.to(wide), approximate="tanh").to(up.dtype)
    return F.silu(gate.to(wide)).mul_(up).to(up.dtype)


def activate_backward(
    dh: Tensor, up: Tensor, gate: Tensor | None, space: Space = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation once more, and the gradients of up and gate; dh may be overwritten.

    space: three tensors like up, of fp32 or fp64.
    """
    wide = statistics_dtype(up)
    dtype, up, dh = up.dtype, up.to(wide), dh.to(wide)
    h, first, second = [torch.empty_like(up) for _ in range(3)] if space is None else space
    if gate is None:
        aten.gelu.out(up, approximate="tanh", out=h)
        aten.gelu_backward.grad_input(dh, up, approximate="tanh", grad_input=first)
        return h.to(dtype), first.to(dtype), None
    gate = gate.to(wide)
    silu = aten.silu.out(gate, out=first)
    torch.mul(silu, up, out=h)
    dup = silu.mul_(dh)
    aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=second)
    return h.to(dtype), dup.to(dtype), second.to(dtype)


def workspace(like: Tensor, counts: Tensor, inner: int, number: int) -> list[Tensor] | None:
    """`number` tensors (M, F) for the rows of any block, so that these do not ask for memory each; None in
    half precision, where what lies between is of fp32."""
    if like.dtype != statistics_dtype(like):
        return None
    rows = min(int(counts.max()), _piece_rows(like, inner)) if counts.numel() else 0
    return [like.new_empty(rows, inner) for _ in range(number)]


def _piece_rows(x: Tensor, inner: int) -> int:
    if x.device.type == "cpu" and x.dtype == statistics_dtype(x):
        return max(1, PIECE_BYTES // max(1, inner * x.element_size()))
    return max(1, x.shape[0])


def pieces(x: Tensor, inner: int, number: int) -> list[Tensor]:
    """Space for `number` tensors (A, F), each cut into runs of rows: first those of the first."""
    size = _piece_rows(x, inner)
    sizes = [min(size, x.shape[0] - start) for start in range(0, x.shape[0], size)] or [0]
    return [x.new_empty(rows, inner) for _ in range(number) for rows in sizes]


class Block(NamedTuple):
    """Rows start .. end of an expert, `first` if its first ones, that lie in a piece from `offset` on."""

    expert: int
    first: bool
    start: int
    end: int
    piece: int
    offset: int

    def of(self, run: list[Tensor]) -> Tensor:
        """These rows of a tensor in pieces."""
        return run[self.piece][self.offset : self.offset + self.end - self.start]

    def within(self, space: Space) -> Space:
        """As many rows of each tensor of the workspace."""
        return None if space is None else [one[: self.end - self.start] for one in space]


def blocks(counts: Tensor, run: list[Tensor]) -> Iterator[Block]:
    """All rows of a tensor in pieces; experts without rows have no block."""
    bounds = row_bounds(counts, sum(piece.shape[0] for piece in run))
    size = max(1, run[0].shape[0])
    for expert, (first, last) in enumerate(bounds):
        start = first
        while start < last:
            end = min(last, (start // size + 1) * size)
            yield Block(expert, start == first, start, end, start // size, start % size)
            start = end


def forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """y (A, C), and what goes into the activation: up (A, F) in pieces, then gate, if there is one."""
    if x.is_cuda:
        return _forward_at_once(x, up, down, counts, gate, up_bias, gate_bias, down_bias)
    y = x.new_empty(x.shape[0], down.shape[1])
    inner = pieces(x, up.shape[1], 1 if gate is None else 2)
    inner_up, inner_gate = _halves(inner, gate)
    space = workspace(x, counts, up.shape[1], 1)
    for block in blocks(counts, inner_up):
        e, rows = block.expert, x[block.start : block.end]
        up_e = _linear(rows, up[e], up_bias, e, block.of(inner_up))
        gate_e = None if gate is None else _linear(rows, gate[e], gate_bias, e, block.of(inner_gate))
        h = activate(up_e, gate_e, block.within(space))
        _linear(h, down[e], down_bias, e, y[block.start : block.end])
    return y, inner


def _halves(inner: Sequence[Tensor], gate: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """up and gate, each in pieces; nothing where there is no gate."""
    number = len(inner) if gate is None else len(inner) // 2
    return list(inner[:number]), list(inner[number:])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias[expert], x, weight.T, out=out)


def _set_or_add(gradient: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if first:
        torch.mm(a, b, out=gradient)
    else:
        gradient.addmm_(a, b)


def _empty_gradient(weight: Tensor, counts: Tensor) -> Tensor:
    """Like weight (E, ...), to be written where an expert has rows, zero where it has none."""
    gradient = weight.new_empty(weight.shape)
    for expert, count in enumerate(counts.tolist()):
        if count == 0:
            gradient[expert] = 0
    return gradient


def backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    inner: Sequence[Tensor],
    with_bias: Sequence[bool],
) -> Gradients:
    """Gradients of all inputs. with_bias: which of up_bias, gate_bias and down_bias there are."""
    if x.is_cuda:
        return _backward_at_once(dy, x, up, down, counts, gate, inner, with_bias)
    dx = x.new_empty(x.shape)
    dup, ddown = _empty_gradient(up, counts), _empty_gradient(down, counts)
    dgate = None if gate is None else _empty_gradient(gate, counts)
    dbiases = [
        weight.new_zeros(weight.shape[:2]) if wanted else None
        for weight, wanted in zip((up, up, down), with_bias, strict=True)
    ]
    inner_up, inner_gate = _halves(inner, gate)
    space = workspace(x, counts, up.shape[1], 4)
    for block in blocks(counts, inner_up):
        e, first = block.expert, block.first
        rows, dy_e, dx_e = (y[block.start : block.end] for y in (x, dy, dx))
        gate_e = None if gate is None else block.of(inner_gate)
        within = block.within(space)
        dh = dy_e @ down[e] if within is None else torch.mm(dy_e, down[e], out=within.pop())
        h, dup_e, dgate_e = activate_backward(dh, block.of(inner_up), gate_e, within)
        _set_or_add(ddown[e], dy_e.T, h, first)
        _set_or_add(dup[e], dup_e.T, rows, first)
        torch.mm(dup_e, up[e], out=dx_e)
        if gate is not None and dgate is not None and dgate_e is not None:
            _set_or_add(dgate[e], dgate_e.T, rows, first)
            dx_e.addmm_(dgate_e, gate[e])
        for dbias, rows_e in zip(dbiases, (dup_e, dgate_e, dy_e), strict=True):
            if dbias is not None and rows_e is not None:
                dbias[e] += rows_e.sum(0, dtype=statistics_dtype(rows_e))
    return dx, dup, ddown, dgate, dbiases[0], dbiases[1], dbiases[2]


def _forward_at_once(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    x = x.contiguous()

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = forward_rows(rows, weight.contiguous(), counts)
        return y if bias is None else add_bias(y, bias, counts)

    inner_up = linear(x, up, up_bias)
    inner_gate = None if gate is None else linear(x, gate, gate_bias)
    y = linear(activate(inner_up, inner_gate), down, down_bias)
    return y, [inner_up] if inner_gate is None else [inner_up, inner_gate]


def _backward_at_once(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    inner: Sequence[Tensor],
    with_bias: Sequence[bool],
) -> Gradients:
    dy, x = dy.contiguous(), x.contiguous()
    inner_up, inner_gate = inner[0], None if gate is None else inner[1]
    h, dinner_up, dinner_gate = activate_backward(
        backward_rows(dy, down.contiguous(), counts), inner_up, inner_gate
    )
    ddown = weight_gradient(dy, h, counts)
    del h
    dx = backward_rows(dinner_up, up.contiguous(), counts)
    dup, dgate = weight_gradient(dinner_up, x, counts), None
    if gate is not None and dinner_gate is not None:
        dx.add_(backward_rows(dinner_gate, gate.contiguous(), counts))
        dgate = weight_gradient(dinner_gate, x, counts)
    dbiases = [
        bias_gradient(rows, counts) if wanted and rows is not None else None
        for rows, wanted in zip((dinner_up, dinner_gate, dy), with_bias, strict=True)
    ]
    return dx, dup, ddown, dgate, dbiases[0], dbiases[1], dbiases[2]
