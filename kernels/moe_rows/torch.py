"""Gathering and combining as operators without index_add: what is added up is fetched instead.

N tokens, K slots of a token, A rows, C channels. Results are the same on every run, on any device.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype

CHUNK_ELEMENTS = 1 << 18
"""Elements worked on at once on the CPU, 1 MiB of fp32: what fits a core's cache."""


def _chunks(length: int, channels: int, device: torch.device) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, channels)) if device.type == "cpu" else max(1, length)
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


def sum_of_slots(rows: Tensor, weights: Tensor | None, slots: Tensor) -> Tensor:
    """(N, C): the rows of each token's slots, times weights (N, K), added up in fp32 at least."""
    y = rows.new_zeros(slots.shape[0], rows.shape[1])
    if rows.numel() == 0:
        return y
    dtype = statistics_dtype(rows, weights)
    missing = slots < 0
    # On an accelerator one would have to wait to know.
    complete = slots.device.type == "cpu" and not bool(missing.any())
    if complete and rows.dtype == dtype == torch.float32:
        return _bags(rows, weights, slots)
    places = slots if complete else slots.clamp(min=0)
    for chunk in _chunks(slots.shape[0], rows.shape[1], rows.device):
        total: Tensor | None = None
        for k in range(slots.shape[1]):
            picked = rows.index_select(0, places[chunk, k]).to(dtype)
            if weights is not None:
                picked.mul_(weights[chunk, k].to(dtype).unsqueeze(1))
            if not complete:
                # Not times zero: what stands in some other token's row may be infinite.
                picked.masked_fill_(missing[chunk, k].unsqueeze(1), 0)
            total = picked if total is None else total.add_(picked)
        if total is not None:
            y[chunk] = total
    return y


def _bags(rows: Tensor, weights: Tensor | None, slots: Tensor) -> Tensor:
    """`sum_of_slots` where each slot has a row, by PyTorch's embedding bags: fetch and add in one go."""
    starts = torch.arange(slots.shape[0] + 1).mul_(slots.shape[1])
    factors = None if weights is None else weights.to(rows.dtype).flatten()
    table = rows.contiguous()
    return torch.ops.aten._embedding_bag_forward_only(
        table, slots.flatten(), starts, False, 0, False, factors, True, -1
    )[0]


@define("moe_gather")
def moe_gather_op(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """rows (A, C)."""
    return x.index_select(0, tokens)


@moe_gather_op.register_fake
def _(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(tokens.shape[0], x.shape[1])


@define("moe_gather_backward")
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


@define("moe_combine")
def moe_combine_op(rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """y (N, C)."""
    return sum_of_slots(rows, weights, slots)


@moe_combine_op.register_fake
def _(rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    return rows.new_empty(slots.shape[0], rows.shape[1])


@define("moe_combine_backward")
def moe_combine_backward_op(
    dy: Tensor, rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """drows (A, C) and dweights (N, K)."""
    dtype = statistics_dtype(rows, weights)
    size_a = rows.shape[0]
    drows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    # Of each row its weight, and afterwards the weight's gradient; one place more for the slots without row.
    places = slots.where(slots >= 0, size_a).flatten()
    of_row = torch.zeros(size_a + 1, dtype=dtype, device=rows.device)
    of_row = of_row.scatter(0, places, weights.to(dtype).flatten())
    dot = torch.zeros_like(of_row)
    for chunk in _chunks(size_a, rows.shape[1], rows.device):
        picked = torch.index_select(dy, 0, tokens[chunk], out=drows[chunk])
        wide = picked.to(dtype)
        torch.sum(wide * rows[chunk], 1, out=dot[chunk])
        picked.copy_(wide.mul_(of_row[chunk].unsqueeze(1)))
    dot[size_a] = 0
    return drows, dot[places].view(slots.shape).to(weights.dtype)


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
