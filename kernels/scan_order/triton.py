"""Tokens put in scan orders and back in Triton: lines of channels are copied, or added up, as they are read.

B batch, T tokens of a row, C channels, K orders. The mathematics is torch.py's. A program has a tile of
tokens and channels of one row; what it writes is contiguous, what it reads are whole lines of channels.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype
from triptych.kernels.triton_launch import accumulator, launch, power_of_2

TILE = 2048
"""Elements of a program, of 4 warps."""
WIDEST = 256
"""Channels of a program."""


@triton.jit
def gather_kernel(
    x_ptr,
    orders_ptr,
    y_ptr,
    batch,
    length,
    num_channels,
    blocks,
    x_b,
    x_t,
    o_k,
    o_b,
    COUNT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Grid: blocks of tokens of all K B rows, blocks of channels."""
    block = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = block // blocks
    tokens = block % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < length
    from_row = row % batch
    visited = tl.load(orders_ptr + row // batch * o_k + from_row * o_b + tokens, mask=inside, other=0)
    mask = inside[:, None] & (channels < num_channels)[None, :]
    x = tl.load(x_ptr + from_row * x_b + visited[:, None] * x_t + channels[None, :], mask=mask)
    if MEAN:
        x = (x.to(ACC) / COUNT).to(x.dtype)
    tl.store(y_ptr + (row * length + tokens)[:, None] * num_channels + channels[None, :], x, mask=mask)


@triton.jit
def scatter_kernel(
    y_ptr,
    inverse_ptr,
    x_ptr,
    length,
    num_channels,
    blocks,
    y_b,
    y_t,
    o_k,
    o_b,
    y_k,
    COUNT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Grid: blocks of tokens of all B rows, blocks of channels. The orders are added one after the other."""
    block = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = block // blocks
    tokens = block % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < length
    mask = inside[:, None] & (channels < num_channels)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    inverse_row = inverse_ptr + row * o_b
    y_row = y_ptr + row * y_b
    for _ in range(COUNT):
        place = tl.load(inverse_row + tokens, mask=inside, other=0)
        total += tl.load(y_row + place[:, None] * y_t + channels[None, :], mask=mask, other=0.0).to(ACC)
        inverse_row += o_k
        y_row += y_k
    if MEAN:
        total /= COUNT
    x = total.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + (row * length + tokens)[:, None] * num_channels + channels[None, :], x, mask=mask)


def _tiles(length: int, channels: int) -> tuple[int, int]:
    """Tokens and channels of a program."""
    block_c = min(power_of_2(channels), WIDEST)
    return min(TILE // block_c, power_of_2(length, at_least=1)), block_c


def _laid_out(x: Tensor, orders: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """x and orders with their last dimension contiguous, and the other strides of both."""
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    orders = orders.contiguous()
    length = orders.shape[-1]
    of_orders = (length, 0) if orders.dim() == 2 else (orders.shape[1] * length, length)
    return x, orders, (x.stride(0), x.stride(1), *of_orders)


@define("scan_gather_triton")
def scan_gather_op(x: Tensor, orders: Tensor, inverse: Tensor, mean: bool) -> Tensor:
    """(B, T, C) -> (K B, T, C)."""
    batch, length, channels = x.shape
    x, orders, strides = _laid_out(x, orders)
    block_t, block_c = _tiles(length, channels)
    blocks = -(-length // block_t)
    y = x.new_empty(orders.shape[0] * batch, length, channels)
    launch(
        gather_kernel, (y.shape[0] * blocks, -(-channels // block_c)),
        x, orders, y, batch, length, channels, blocks, *strides,
        COUNT=orders.shape[0], MEAN=mean,
        BLOCK_T=block_t, BLOCK_C=block_c, ACC=accumulator(statistics_dtype(x)),
    )  # fmt: skip
    return y


@scan_gather_op.register_fake
def _(x: Tensor, orders: Tensor, inverse: Tensor, mean: bool) -> Tensor:
    return x.new_empty(orders.shape[0] * x.shape[0], *x.shape[1:])


@define("scan_scatter_triton")
def scan_scatter_op(y: Tensor, orders: Tensor, inverse: Tensor, mean: bool) -> Tensor:
    """(K B, T, C) -> (B, T, C)."""
    count = orders.shape[0]
    batch, (length, channels) = y.shape[0] // count, y.shape[1:]
    y, inverse, strides = _laid_out(y, inverse)
    block_t, block_c = _tiles(length, channels)
    blocks = -(-length // block_t)
    x = y.new_empty(batch, length, channels)
    launch(
        scatter_kernel, (batch * blocks, -(-channels // block_c)),
        y, inverse, x, length, channels, blocks, *strides, batch * y.stride(0),
        COUNT=count, MEAN=mean, BLOCK_T=block_t, BLOCK_C=block_c, ACC=accumulator(statistics_dtype(y)),
    )  # fmt: skip
    return x


@scan_scatter_op.register_fake
def _(y: Tensor, orders: Tensor, inverse: Tensor, mean: bool) -> Tensor:
    return y.new_empty(y.shape[0] // orders.shape[0], *y.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, orders, inverse, ctx.mean = inputs
    ctx.save_for_backward(orders, inverse)


def _backward_of_gather(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return scan_scatter_op(dy, *ctx.saved_tensors, ctx.mean), None, None, None


def _backward_of_scatter(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
    return scan_gather_op(dx, *ctx.saved_tensors, ctx.mean), None, None, None


scan_gather_op.register_autograd(_backward_of_gather, setup_context=_setup)
scan_scatter_op.register_autograd(_backward_of_scatter, setup_context=_setup)


def scan_gather(x: Tensor, orders: Tensor, inverse: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return scan_gather_op(x, orders, inverse, False)


def scan_scatter(y: Tensor, orders: Tensor, inverse: Tensor, *, mean: bool) -> Tensor:
    """Shapes as in the public function."""
    return scan_scatter_op(y, orders, inverse, mean)
