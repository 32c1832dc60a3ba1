"""Tokens put in scan orders and back. B batch, T tokens of a row, C channels, K orders.

An order is a permutation of a row's tokens: position t of a scan visits token order[t]. Both ways are
gathers, forward by the order or by its inverse and backward by the other one: there are no atomic additions.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.library import operator
from triptych.kernels.scan_order import examples, reference
from triptych.kernels.scan_order import torch as fast
from triptych.kernels.scan_order.orders import checked_inverse, invert_orders

__all__ = ["invert_orders", "scan_gather", "scan_scatter"]


@operator(integers=("orders", "inverse"), free=("x",))
def scan_gather(
    x: Tensor, orders: Tensor, *, inverse: Tensor | None = None, form: str | None = None
) -> Tensor:
    """The tokens of every row in each of K orders: row k B + b of the result is row b in order k.

    x: (B, T, C), any dtype. orders: int64 (K, T), or (K, B, T) where each row has its own. inverse: what
    `invert_orders(orders)` gives, for callers that keep it; None finds it.
    Returns (K B, T, C), contiguous. Saves the orders only. Raises ValueError for what does not fit and, where
    the values are on the CPU, for orders that are no permutations or not those that `inverse` inverts.
    """
    if x.dim() != 3:
        raise ValueError(f"scan_gather: x must be (B, T, C), it is {tuple(x.shape)}")
    inverse = checked_inverse("scan_gather", x.shape[0], x.shape[1], x, orders, inverse)
    chosen = dispatch.choose("scan_gather", form, x.device, x, orders, inverse)
    return chosen.run(x, orders, inverse)


@operator(integers=("orders", "inverse"))
def scan_scatter(
    y: Tensor,
    orders: Tensor,
    *,
    inverse: Tensor | None = None,
    reduce: Literal["sum", "mean"] = "sum",
    form: str | None = None,
) -> Tensor:
    """Every token back at its place: the sum, or the mean, over the K orders of what `scan_gather` laid out.

    y: (K B, T, C), rows ordered as there. orders, inverse: as there. Added up in fp32 (fp64 for fp64).
    Returns (B, T, C) of y's dtype, contiguous. Saves the orders only. Raises ValueError as scan_gather does.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"scan_scatter: reduce={reduce!r} is not known; use 'sum' or 'mean'")
    if y.dim() != 3 or orders.dim() < 2 or y.shape[0] % max(1, orders.shape[0]):
        raise ValueError(
            "scan_scatter: y must be (K B, T, C) and orders (K, T) or (K, B, T); "
            f"they are {tuple(y.shape)} and {tuple(orders.shape)}"
        )
    batch = y.shape[0] // max(1, orders.shape[0])
    inverse = checked_inverse("scan_scatter", batch, y.shape[1], y, orders, inverse)
    mean = reduce == "mean"
    chosen = dispatch.choose("scan_scatter", form, y.device, y, orders, inverse, mean=mean)
    return chosen.run(y, orders, inverse, mean=mean)


def _register(op: str, function: Any) -> None:
    dispatch.register(op, triton_launch.form("triptych.kernels.scan_order.triton", op))
    dispatch.register(op, dispatch.Form("torch", getattr(fast, op)))
    dispatch.register(op, dispatch.Form("reference", getattr(reference, op)))
    dispatch.register_examples(op, function, examples.MAKERS[op])


_register("scan_gather", scan_gather)
_register("scan_scatter", scan_scatter)
