"""Checks of scan orders, and their inverses. B batch, T tokens of a row, C channels, K orders."""

from __future__ import annotations

import torch
from torch import Tensor


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at for nothing: on the CPU, and not of a subclass such as fake tensors."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def invert_orders(orders: Tensor) -> Tensor:
    """The permutations that undo `orders`, int64 (..., T): inverse[orders[t]] = t.

    Raises ValueError where the values are on the CPU and are no permutations.
    """
    places = torch.arange(orders.shape[-1], device=orders.device).expand(orders.shape)
    if not _readable(orders):
        return torch.empty_like(orders).scatter_(-1, orders, places)
    if orders.numel() and (int(orders.min()) < 0 or int(orders.max()) >= orders.shape[-1]):
        raise ValueError(
            f"orders must hold token numbers from 0 to T-1 = {orders.shape[-1] - 1}; "
            f"they go from {int(orders.min())} to {int(orders.max())}"
        )
    inverse = torch.full_like(orders, -1).scatter_(-1, orders, places)
    if (inverse < 0).any():
        *row, token = (inverse < 0).nonzero()[0].tolist()
        raise ValueError(f"orders must be permutations; order {row} never visits token {token}")
    return inverse


def _check_inverse(op: str, orders: Tensor, inverse: Tensor) -> None:
    """Raises ValueError unless orders and inverse, on the CPU, are permutations that undo each other."""
    try:
        there_and_back = orders.gather(-1, inverse)
    except RuntimeError:  # a number that no token has
        there_and_back = orders.new_empty(0)
    if not torch.equal(there_and_back, torch.arange(orders.shape[-1]).expand(orders.shape)):
        raise ValueError(
            f"{op}: inverse does not invert the orders; use invert_orders(orders), or leave it out"
        )


def checked_inverse(
    op: str, batch: int, length: int, tokens: Tensor, orders: Tensor, inverse: Tensor | None
) -> Tensor:
    """The inverse of the orders, given or found. Raises ValueError for what does not fit."""
    if orders.dim() not in (2, 3) or orders.shape[1:] not in ((length,), (batch, length)):
        raise ValueError(
            f"{op}: orders must be (K, T) or (K, B, T) with (B, T) = {(batch, length)}; "
            f"they are {tuple(orders.shape)}"
        )
    if 0 in orders.shape or 0 in tokens.shape:
        raise ValueError(
            f"{op}: there is nothing to order, with tokens {tuple(tokens.shape)} and orders "
            f"{tuple(orders.shape)}"
        )
    if orders.dtype != torch.int64:
        raise ValueError(f"{op}: orders must be int64, they are {orders.dtype}; use orders.long()")
    if inverse is None:
        return invert_orders(orders)
    if inverse.shape != orders.shape or inverse.dtype != orders.dtype:
        raise ValueError(
            f"{op}: inverse must be like orders, {orders.dtype} {tuple(orders.shape)}; "
            f"it is {inverse.dtype} {tuple(inverse.shape)}"
        )
    if _readable(orders) and _readable(inverse):
        _check_inverse(op, orders, inverse)
    return inverse
