"""Gathering and combining in Triton: each result is fetched by one program, so nothing is added atomically.

N tokens, K slots of a token, A rows, C channels. One program per row or token, blocks of channels within it.
What is added up is added in the order of a token's slots: the same on every run.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype
from triptych.kernels.triton_launch import accumulator, launch, power_of_2

LARGEST_BLOCK = 4096


@triton.jit
def gather_kernel(x, tokens, rows, stride, C: tl.constexpr, BLOCK: tl.constexpr):
    """rows[a] = x[tokens[a]]."""
    a = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + a)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + token * stride + at, mask=at < C)
        tl.store(rows + a * C + at, value, mask=at < C)


@triton.jit
def sum_of_slots_kernel(
    rows, weights, slots, y, stride,
    K: tl.constexpr, C: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[n] = sum_k weights[n, k] rows[slots[n, k]], without those of slot -1."""
    n = tl.program_id(0).to(tl.int64)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], ACC)
        for k in range(K):
            slot = tl.load(slots + n * K + k)
            value = tl.load(rows + slot * stride + at, mask=(at < C) & (slot >= 0), other=0.0).to(ACC)
            if WEIGHTED:
                value *= tl.load(weights + n * K + k, mask=slot >= 0, other=0.0).to(ACC)
            total += value
        tl.store(y + n * C + at, total.to(y.dtype.element_ty), mask=at < C)


@triton.jit
def combine_backward_kernel(
    dy, rows, weights, slots, tokens, drows, dweights, dy_stride, stride,
    K: tl.constexpr, POW_K: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """drows[a] = weights[n, k] dy[n] and dweights[n, k] = rows[a] . dy[n], where row a stands in slot k of n;
    drows is 0 for a row that stands nowhere."""
    a = tl.program_id(0).to(tl.int64)
    n = tl.load(tokens + a)
    k = n * K + tl.arange(0, POW_K)
    own = tl.load(slots + k, mask=tl.arange(0, POW_K) < K, other=-1) == a
    weight = tl.sum(tl.load(weights + k, mask=own, other=0.0).to(ACC), 0)
    dot = tl.zeros([BLOCK], ACC)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        gradient = tl.load(dy + n * dy_stride + at, mask=at < C, other=0.0).to(ACC)
        dot += gradient * tl.load(rows + a * stride + at, mask=at < C, other=0.0).to(ACC)
        tl.store(drows + a * C + at, (weight * gradient).to(drows.dtype.element_ty), mask=at < C)
    total = tl.sum(dot, 0) + tl.zeros([POW_K], ACC)
    tl.store(dweights + k, total.to(dweights.dtype.element_ty), mask=own)


def _block(channels: int) -> dict[str, int]:
    block = min(LARGEST_BLOCK, power_of_2(channels))
    return {"C": channels, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def _rows(x: Tensor) -> Tensor:
    """x with its channels side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def sum_of_slots(rows: Tensor, weights: Tensor | None, slots: Tensor) -> Tensor:
    """(N, C): the rows of each token's slots, times weights (N, K), added up in fp32 at least."""
    (size_n, size_k), channels = slots.shape, rows.shape[1]
    if rows.numel() == 0:
        return rows.new_zeros(size_n, channels)
    rows, y = _rows(rows), rows.new_empty(size_n, channels)
    tensors = (rows, slots if weights is None else weights.contiguous(), slots.contiguous(), y)
    acc = accumulator(statistics_dtype(rows, weights))
    weighted = weights is not None
    if size_n:
        constants = {"K": size_k, "WEIGHTED": weighted, "ACC": acc} | _block(channels)
        launch(sum_of_slots_kernel, (size_n,), *tensors, rows.stride(0), **constants)
    return y


@define("moe_gather_triton")
def moe_gather_op(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """rows (A, C)."""
    x, rows = _rows(x), x.new_empty(tokens.shape[0], x.shape[1])
    if rows.numel():
        tensors = (x, tokens.contiguous(), rows)
        launch(gather_kernel, (tokens.shape[0],), *tensors, x.stride(0), **_block(x.shape[1]))
    return rows


@moe_gather_op.register_fake
def _(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(tokens.shape[0], x.shape[1])


@define("moe_gather_triton_backward")
def moe_gather_backward_op(drows: Tensor, slots: Tensor) -> Tensor:
    """dx (N, C)."""
    return sum_of_slots(drows, None, slots)


@moe_gather_backward_op.register_fake
def _(drows: Tensor, slots: Tensor) -> Tensor:
    return drows.new_empty(slots.shape[0], drows.shape[1])


def _setup_gather(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward_gather(ctx: Any, drows: Tensor) -> tuple[Any, ...]:
    return moe_gather_backward_op(drows, *ctx.saved_tensors), None, None


moe_gather_op.register_autograd(_backward_gather, setup_context=_setup_gather)


@define("moe_combine_triton")
def moe_combine_op(rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """y (N, C)."""
    return sum_of_slots(rows, weights, slots)


@moe_combine_op.register_fake
def _(rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    return rows.new_empty(slots.shape[0], rows.shape[1])


@define("moe_combine_triton_backward")
def moe_combine_backward_op(
    dy: Tensor, rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """drows (A, C) and dweights (N, K)."""
    dy, rows = _rows(dy), _rows(rows)
    # Slots without row have a gradient that no program writes.
    drows, dweights = rows.new_empty(rows.shape), weights.new_zeros(weights.shape)
    if rows.numel() == 0:
        return drows, dweights
    tensors = (dy, rows, weights.contiguous(), slots.contiguous(), tokens.contiguous(), drows, dweights)
    constants = {"K": slots.shape[1], "POW_K": power_of_2(slots.shape[1], 1)} | _block(rows.shape[1])
    acc = accumulator(statistics_dtype(rows, weights))
    strides = (dy.stride(0), rows.stride(0))
    launch(combine_backward_kernel, rows.shape[:1], *tensors, *strides, ACC=acc, **constants)
    return drows, dweights


@moe_combine_backward_op.register_fake
def _(dy: Tensor, rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _setup_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_combine(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *moe_combine_backward_op(dy, *ctx.saved_tensors), None, None


moe_combine_op.register_autograd(_backward_combine, setup_context=_setup_combine)


def moe_gather(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return moe_gather_op(x, tokens, slots)


def moe_combine(rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return moe_combine_op(rows, weights, slots, tokens)
