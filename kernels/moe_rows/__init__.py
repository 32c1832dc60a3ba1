"""Tokens to rows sorted by expert and back. N tokens, K slots of a token, A rows, C channels, E experts."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.library import operator
from triptych.kernels.moe_rows import examples, reference
from triptych.kernels.moe_rows import torch as fast
from triptych.kernels.moe_rows.plan import moe_plan

__all__ = ["moe_combine", "moe_gather", "moe_plan"]


@operator(integers=("tokens", "slots"))
def moe_gather(x: Tensor, tokens: Tensor, slots: Tensor, *, form: str | None = None) -> Tensor:
    """rows[a] = x[tokens[a]].

    x: (N, C). tokens: int64 (A,), the token of each row. slots: int64 (N, K), the row of each slot of a
    token, -1 for none; each row stands in one slot of its token, as `moe_plan` has it. Returns (A, C) of x's
    dtype. The gradient of a token is the sum over its slots, in their order and in fp32 at least: the same on
    every run, on any device. Saves slots. Raises ValueError for shapes that do not fit.
    """
    _check("moe_gather", x, "x (N, C)", tokens, slots)
    if slots.shape[0] != x.shape[0]:
        raise ValueError(
            f"moe_gather: slots {tuple(slots.shape)} must have a row for each of the {x.shape[0]} tokens"
        )
    return dispatch.choose("moe_gather", form, x.device, x).run(x, tokens, slots)


@operator(integers=("slots", "tokens"))
def moe_combine(
    rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor, *, form: str | None = None
) -> Tensor:
    """y[n] = sum_k weights[n, k] * rows[slots[n, k]].

    rows: (A, C). weights: (N, K), any float dtype. slots: int64 (N, K), the row of each slot, -1 for none,
    which gives 0 whatever its weight. tokens: int64 (A,), the token of each row; each row stands in one slot
    of its token, as `moe_plan` has it. Returns (N, C) of the rows' dtype, added up in fp32 at least.
    Saves its inputs; no (N, K, C) tensor is made. Raises ValueError for shapes that do not fit.
    """
    _check("moe_combine", rows, "rows (A, C)", tokens, slots)
    if weights.shape != slots.shape:
        raise ValueError(
            f"moe_combine: weights {tuple(weights.shape)} must have the shape of slots {tuple(slots.shape)}"
        )
    if tokens.shape[0] != rows.shape[0]:
        raise ValueError(
            f"moe_combine: tokens must be ({rows.shape[0]},), one per row; they are {tuple(tokens.shape)}"
        )
    return dispatch.choose("moe_combine", form, rows.device, rows, weights).run(rows, weights, slots, tokens)


def _check(name: str, x: Tensor, expected: str, tokens: Tensor, slots: Tensor) -> None:
    if x.dim() != 2 or tokens.dim() != 1 or slots.dim() != 2:
        raise ValueError(
            f"{name}: expected {expected}, tokens (A,) and slots (N, K); they are {tuple(x.shape)}, "
            f"{tuple(tokens.shape)} and {tuple(slots.shape)}"
        )


for _op in ("moe_gather", "moe_combine"):
    dispatch.register(_op, triton_launch.form("triptych.kernels.moe_rows.triton", _op))
    dispatch.register(_op, dispatch.Form("torch", getattr(fast, _op)))
    dispatch.register(_op, dispatch.Form("reference", getattr(reference, _op)))
dispatch.register_examples("moe_gather", moe_gather, examples.GATHER_MAKERS)
dispatch.register_examples("moe_combine", moe_combine, examples.COMBINE_MAKERS)
