"""The gated residual in Triton: out = x + g y; dx = dout, dy = g dout, dg = sum of y dout over what g serves.

Lines, groups, tiles and partial sums are those of the norms: `triptych.kernels.layer_norm.lines`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels import triton_launch
from triptych.kernels.layer_norm.lines import Lines, modulated_lines, splits, tile
from triptych.kernels.library import define, statistics_dtype


@triton.jit
def forward_kernel(
    x,
    y,
    gate,
    out,
    groups,
    lines,
    channels,
    gate_stride,
    INTERLEAVED: tl.constexpr,
    PER_LINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    if INTERLEAVED:
        group = program % groups
        item = program // groups * ROWS + tl.arange(0, ROWS)
        line = item * groups + group
    else:
        tiles = tl.cdiv(lines, ROWS)
        group = program // tiles
        item = program % tiles * ROWS + tl.arange(0, ROWS)
        line = group * lines + item
    channel = tl.arange(0, BLOCK)[None, :]
    inside = channel < channels
    mask = (item < lines)[:, None] & inside
    offsets = line[:, None] * channels + channel
    if PER_LINE:
        g = tl.load(gate + line[:, None] * gate_stride + channel, mask=mask, other=0.0).to(ACC)
    else:
        g = tl.load(gate + group * gate_stride + channel, mask=inside, other=0.0).to(ACC)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    value += g * tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dout,
    y,
    gate,
    dy,
    dgate,
    groups,
    lines,
    channels,
    gate_stride,
    INTERLEAVED: tl.constexpr,
    PER_LINE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    if INTERLEAVED:
        group = program % groups
        split = program // groups
    else:
        group = program // SPLITS
        split = program % SPLITS
    channel = tl.arange(0, BLOCK)[None, :]
    inside = channel < channels
    if not PER_LINE:
        g = tl.load(gate + group * gate_stride + channel, mask=inside, other=0.0).to(ACC)
    total = tl.zeros((ROWS, BLOCK), dtype=ACC)
    item_0 = split * ROWS
    while item_0 < lines:
        item = item_0 + tl.arange(0, ROWS)
        if INTERLEAVED:
            line = item * groups + group
        else:
            line = group * lines + item
        mask = (item < lines)[:, None] & inside
        offsets = line[:, None] * channels + channel
        grad = tl.load(dout + offsets, mask=mask, other=0.0).to(ACC)
        term = grad * tl.load(y + offsets, mask=mask, other=0.0).to(ACC)
        if PER_LINE:
            g = tl.load(gate + line[:, None] * gate_stride + channel, mask=mask, other=0.0).to(ACC)
            tl.store(dgate + offsets, term.to(dgate.dtype.element_ty), mask=mask)
        else:
            total += term
        tl.store(dy + offsets, (g * grad).to(dy.dtype.element_ty), mask=mask)
        item_0 += SPLITS * ROWS
    if not PER_LINE:
        into = (split * groups + group) * channels + tl.arange(0, BLOCK)
        tl.store(dgate + into, tl.sum(total, axis=0), mask=tl.arange(0, BLOCK) < channels)


def _layout(x: Tensor, gate: Tensor) -> tuple[Lines, Tensor]:
    """Lines of x, and the gate as rows with neighbouring channels; a part of a larger tensor stays a view."""
    lines = modulated_lines(x.shape, gate.shape)
    assert lines is not None, "the form's `supports` has seen to it"
    rows = gate.reshape(-1, x.shape[-1])
    return lines, rows if rows.stride(-1) == 1 else rows.contiguous()


@define("gated_residual_triton")
def gated_residual_op(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, of x's dtype."""
    lines, gates = _layout(x, gate)
    rows, block, warps = tile(lines)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_launch.launch(
        forward_kernel,
        (lines.groups * triton.cdiv(lines.lines, rows),),
        x.contiguous(),
        y.contiguous(),
        gates,
        out,
        lines.groups,
        lines.lines,
        lines.channels,
        gates.stride(0),
        num_warps=warps,
        INTERLEAVED=lines.interleaved,
        PER_LINE=lines.per_line,
        ROWS=rows,
        BLOCK=block,
        ACC=triton_launch.accumulator(statistics_dtype(x, y, gate)),
    )
    return out


@gated_residual_op.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@define("gated_residual_triton_backward")
def gated_residual_backward_op(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dy and dgate."""
    lines, gates = _layout(y, gate)
    rows, block, warps = tile(lines)
    dtype = statistics_dtype(dout, y, gate)
    programs = triton.cdiv(lines.lines, rows) if lines.per_line else splits(lines)
    if lines.per_line:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    else:
        dgate = gate.new_empty((programs, lines.groups, lines.channels), dtype=dtype)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    triton_launch.launch(
        backward_kernel,
        (lines.groups * programs,),
        dout.contiguous(),
        y.contiguous(),
        gates,
        dy,
        dgate,
        lines.groups,
        lines.lines,
        lines.channels,
        gates.stride(0),
        num_warps=warps,
        INTERLEAVED=lines.interleaved,
        PER_LINE=lines.per_line,
        SPLITS=programs,
        ROWS=rows,
        BLOCK=block,
        ACC=triton_launch.accumulator(dtype),
    )
    return dy, dgate if lines.per_line else dgate.sum(0).view(gate.shape).to(gate.dtype)


@gated_residual_backward_op.register_fake
def _(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dout, *gated_residual_backward_op(dout, *ctx.saved_tensors)


gated_residual_op.register_autograd(_backward, setup_context=_setup)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return gated_residual_op(x, y, gate)
