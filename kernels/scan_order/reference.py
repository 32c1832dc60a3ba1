"""Tokens put in scan orders and back, a row at a time. B batch, T tokens of a row, C channels, K orders."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def _of_each_row(orders: Tensor, batch: int) -> list[Tensor]:
    """The K B orders of T tokens."""
    own = orders if orders.dim() == 3 else orders.unsqueeze(1).expand(-1, batch, -1)
    return list(own.flatten(0, 1).unbind(0))


def scan_gather(x: Tensor, orders: Tensor, inverse: Tensor) -> Tensor:
    """Shapes as in the public function; autograd by PyTorch."""
    rows = itertools.cycle(x.unbind(0))
    return torch.stack([row[order] for row, order in zip(rows, _of_each_row(orders, x.shape[0]))])


def scan_scatter(y: Tensor, orders: Tensor, inverse: Tensor, *, mean: bool) -> Tensor:
    """Shapes as in the public function; autograd by PyTorch."""
    count = orders.shape[0]
    batch = y.shape[0] // count
    wide = y.to(statistics_dtype(y))
    placed = [
        torch.zeros_like(row).index_copy(0, order, row)
        for row, order in zip(wide.unbind(0), _of_each_row(orders, batch))
    ]
    total = torch.stack(placed).unflatten(0, (count, batch)).sum(0)
    return (total / count if mean else total).to(y.dtype)
