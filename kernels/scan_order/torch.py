"""Tokens put in scan orders and back as registered operators, each the other's backward.

B batch, T tokens of a row, C channels, K orders. They save the orders. s is 1, or 1/K for the mean:
    gather:  y[k B + b, t] = s x[b, orders[k, b, t]]
    scatter: x[b, t] = s sum_k y[k B + b, inverse[k, b, t]]
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype


def _first_tokens(batch: int, length: int, orders: Tensor) -> Tensor:
    """int64 (B, 1): the number of each row's first token in the batch."""
    return torch.arange(0, batch * length, length, device=orders.device).unsqueeze(1)


@define("scan_gather")
def scan_gather_op(x: Tensor, orders: Tensor, inverse: Tensor, mean: bool) -> Tensor:
    """(B, T, C) -> (K B, T, C)."""
    batch, length, channels = x.shape
    y = x.new_empty(orders.shape[0], batch, length, channels)
    if orders.dim() == 2:
        for order, scan in zip(orders, y):
            torch.index_select(x, 1, order, out=scan)
    else:
        rows = (orders + _first_tokens(batch, length, orders)).flatten()
        torch.index_select(x.reshape(-1, channels), 0, rows, out=y.view(-1, channels))
    y = y.flatten(0, 1)
    return y.div_(orders.shape[0]) if mean else y


@scan_gather_op.register_fake
def _(x: Tensor, orders: Tensor, inverse: Tensor, mean: bool) -> Tensor:
    return x.new_empty(orders.shape[0] * x.shape[0], *x.shape[1:])


@define("scan_scatter")
def scan_scatter_op(y: Tensor, orders: Tensor, inverse: Tensor, mean: bool) -> Tensor:
    """(K B, T, C) -> (B, T, C)."""
    count = orders.shape[0]
    batch, (length, channels) = y.shape[0] // count, y.shape[1:]
    if count == 1 and orders.dim() == 2:
        return y.index_select(1, inverse[0])
    # (B T, K): tokens as bags of their places in the scans, added up as they are read.
    own = inverse if inverse.dim() == 3 else inverse.unsqueeze(1)
    scans = torch.arange(count, device=y.device).view(count, 1, 1) * (batch * length)
    bags = (own + (scans + _first_tokens(batch, length, inverse))).view(count, -1).t().contiguous()
    wide = y.to(statistics_dtype(y)).reshape(-1, channels)
    x = F.embedding_bag(bags, wide, mode="mean" if mean else "sum")
    return x.view(batch, length, channels).to(y.dtype)


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
