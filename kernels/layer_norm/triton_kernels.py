"""One pair of kernels for every norm of this room, and the host's side of launching them.

u is x, or x silu(z) where the gate comes before the norm; over the M channels of a line (see lines.py)

    m = mean(u) if CENTRED else 0        r = (mean((u - m)^2) + eps)^(-1/2)        n = (u - m) r
    y = n (OFFSET + w) + b, times silu(z) where the gate comes after the norm

and backward, with g = dy, or dy silu(z) where the gate comes after, and d = g (OFFSET + w):

    dw = sum g n        db = sum g        du = r (d - n mean(d n) - (mean(d) if CENTRED))

A program of the forward holds one tile of whole lines. One of the backward goes through several tiles of one
group and adds dw and db up in registers; the sums of all programs of a group go to a buffer that the host
adds up, so that no result depends on the order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels import triton_launch
from triptych.kernels.layer_norm.lines import Lines, splits, tile

NO_GATE, GATE_FIRST, NORM_FIRST = 0, 1, 2


@triton.jit
def forward_kernel(
    x,
    z,
    w,
    b,
    y,
    mean,
    rstd,
    groups,
    lines,
    channels,
    w_stride,
    b_stride,
    eps,
    CENTRED: tl.constexpr,
    GATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PER_LINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        group = program % groups
        item = program // groups * ROWS + tl.arange(0, ROWS)
        line = item * groups + group
    else:
        tiles = tl.cdiv(lines, ROWS)
        group = program // tiles
        item = program % tiles * ROWS + tl.arange(0, ROWS)
        line = group * lines + item
    inside = channel < channels
    mask = (item < lines)[:, None] & inside
    offsets = line[:, None] * channels + channel

    u = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
    if GATE != 0:
        gate = tl.load(z + offsets, mask=mask, other=0.0).to(ACC)
        silu = gate * tl.sigmoid(gate)
    if GATE == 1:
        u = u * silu
    if CENTRED:
        m = tl.sum(u, axis=1) / channels
        tl.store(mean + line, m, mask=item < lines)
        u = tl.where(mask, u - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(u * u, axis=1) / channels + eps)
    tl.store(rstd + line, r, mask=item < lines)
    out = u * r[:, None]
    if PER_LINE:
        row = line[:, None]
        inside = mask
    else:
        row = group
    if WEIGHT:
        out = out * (OFFSET + tl.load(w + row * w_stride + channel, mask=inside, other=0.0).to(ACC))
    if BIAS:
        out = out + tl.load(b + row * b_stride + channel, mask=inside, other=0.0).to(ACC)
    if GATE == 2:
        out = out * silu
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy,
    x,
    z,
    w,
    mean,
    rstd,
    dx,
    dz,
    dw,
    db,
    groups,
    lines,
    channels,
    w_stride,
    CENTRED: tl.constexpr,
    GATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
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
    if WEIGHT and not PER_LINE:
        weight = OFFSET + tl.load(w + group * w_stride + channel, mask=inside, other=0.0).to(ACC)
    dw_sum = tl.zeros((ROWS, BLOCK), dtype=ACC)
    db_sum = tl.zeros((ROWS, BLOCK), dtype=ACC)

    item_0 = split * ROWS
    while item_0 < lines:
        item = item_0 + tl.arange(0, ROWS)
        if INTERLEAVED:
            line = item * groups + group
        else:
            line = group * lines + item
        mask = (item < lines)[:, None] & inside
        offsets = line[:, None] * channels + channel
        grad = tl.load(dy + offsets, mask=mask, other=0.0).to(ACC)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(ACC)
        r = tl.load(rstd + line, mask=item < lines, other=0.0)[:, None]
        if PER_LINE:
            weight = OFFSET + tl.load(w + line[:, None] * w_stride + channel, mask=mask, other=0.0).to(ACC)
        if GATE != 0:
            gate = tl.load(z + offsets, mask=mask, other=0.0).to(ACC)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            slope = sigmoid + silu * (1.0 - sigmoid)
        u = value
        if GATE == 1:
            u = value * silu
        if CENTRED:
            u = u - tl.load(mean + line, mask=item < lines, other=0.0)[:, None]
        n = u * r
        if GATE == 2:
            dgate = grad * n * slope
            if WEIGHT:
                dgate = dgate * weight
            tl.store(dz + offsets, dgate.to(dz.dtype.element_ty), mask=mask)
            grad = grad * silu
        d = grad
        if WEIGHT:
            d = grad * weight
        if PER_LINE:
            tl.store(dw + offsets, (grad * n).to(dw.dtype.element_ty), mask=mask)
            tl.store(db + offsets, grad.to(db.dtype.element_ty), mask=mask)
        else:
            if WEIGHT:
                dw_sum += grad * n
            if BIAS:
                db_sum += grad
        du = d - n * (tl.sum(d * n, axis=1) / channels)[:, None]
        if CENTRED:
            du = du - (tl.sum(d, axis=1) / channels)[:, None]
        du = du * r
        if GATE == 1:
            tl.store(dz + offsets, (du * value * slope).to(dz.dtype.element_ty), mask=mask)
            du = du * silu
        tl.store(dx + offsets, du.to(dx.dtype.element_ty), mask=mask)
        item_0 += SPLITS * ROWS

    if not PER_LINE:
        into = (split * groups + group) * channels + tl.arange(0, BLOCK)
        held = tl.arange(0, BLOCK) < channels
        if WEIGHT:
            tl.store(dw + into, tl.sum(dw_sum, axis=0), mask=held)
        if BIAS:
            tl.store(db + into, tl.sum(db_sum, axis=0), mask=held)


def forward(
    x: Tensor,
    z: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    lines: Lines,
    eps: float,
    *,
    dtype: torch.dtype,
    centred: bool,
    gate: int = NO_GATE,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, mean (empty unless centred) and rstd (lines,) in `dtype`, that of the statistics. w and b:
    a row per group, or per line, whose channels lie next to each other."""
    x = x.contiguous()
    y = torch.empty_like(x)
    mean = x.new_empty(lines.total if centred else 0, dtype=dtype)
    rstd = x.new_empty(lines.total, dtype=dtype)
    rows, block, warps = tile(lines)
    triton_launch.launch(
        forward_kernel,
        (lines.groups * triton.cdiv(lines.lines, rows),),
        x,
        x if z is None else z.contiguous(),
        x if w is None else w,
        x if b is None else b,
        y,
        mean if centred else rstd,
        rstd,
        lines.groups,
        lines.lines,
        lines.channels,
        0 if w is None else w.stride(0),
        0 if b is None else b.stride(0),
        eps,
        num_warps=warps,
        **_constexprs(lines, w, b is not None, centred, gate, offset, rows, block, dtype),
    )
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    w: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    lines: Lines,
    *,
    has_bias: bool = False,
    centred: bool,
    gate: int = NO_GATE,
    offset: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dz, dw and db. The latter: per group in the statistics' dtype, or per line in w's."""
    x, dy, dtype = x.contiguous(), dy.contiguous(), rstd.dtype
    dx = torch.empty_like(x)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    rows, block, warps = tile(lines)
    programs = triton.cdiv(lines.lines, rows) if lines.per_line else splits(lines)
    shape = (lines.total, lines.channels) if lines.per_line else (programs, lines.groups, lines.channels)
    kind = w.dtype if lines.per_line and w is not None else dtype
    dw = None if w is None else x.new_empty(shape, dtype=kind)
    db = x.new_empty(shape, dtype=kind) if has_bias else None
    triton_launch.launch(
        backward_kernel,
        (lines.groups * programs,),
        dy,
        x,
        x if z is None else z.contiguous(),
        x if w is None else w,
        mean if centred else rstd,
        rstd,
        dx,
        dx if dz is None else dz,
        dx if dw is None else dw,
        dx if db is None else db,
        lines.groups,
        lines.lines,
        lines.channels,
        0 if w is None else w.stride(0),
        num_warps=warps,
        SPLITS=programs,
        **_constexprs(lines, w, has_bias, centred, gate, offset, rows, block, dtype),
    )
    if not lines.per_line:
        dw, db = (partial if partial is None else partial.sum(0) for partial in (dw, db))
    return dx, dz, dw, db


def _constexprs(
    lines: Lines,
    w: Tensor | None,
    has_bias: bool,
    centred: bool,
    gate: int,
    offset: int,
    rows: int,
    block: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    return {
        "CENTRED": centred,
        "GATE": gate,
        "WEIGHT": w is not None,
        "BIAS": has_bias,
        "OFFSET": offset,
        "INTERLEAVED": lines.interleaved,
        "PER_LINE": lines.per_line,
        "ROWS": rows,
        "BLOCK": block,
        "ACC": triton_launch.accumulator(dtype),
    }
