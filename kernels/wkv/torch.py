"""WKV in linear time as a registered operator; saves its inputs.

B batch, T length, C channels, docs packed documents.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.segments import document_bounds
from triptych.kernels.wkv import scan


@define("wkv")
def wkv_op(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, C) and the final state (B, 2, C), empty where bidirectional; arguments as in scan.Inputs."""
    return scan.forward(
        scan.Inputs(k, v, w, u, initial_state, scale, starts, ends, scale_u, bidirectional, chunk_size)
    )


@wkv_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    count = 0 if bidirectional else k.shape[0]
    return v.new_empty(v.shape), k.new_empty(count, 2, k.shape[2], dtype=statistics_dtype(k, v, w))


@define("wkv_backward")
def wkv_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial state (empty where bidirectional)."""
    inputs = scan.Inputs(k, v, w, u, initial_state, scale, starts, ends, scale_u, bidirectional, chunk_size)
    grads = scan.backward(dy, dfinal, inputs)
    return grads.k, grads.v, grads.w.to(w.dtype), grads.u.to(u.dtype), grads.initial


@wkv_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = 0 if bidirectional else k.shape[0]
    dstate = k.new_empty(count, 2, k.shape[2], dtype=statistics_dtype(k, v, w))
    dk, dv, dw, du = (x.new_empty(x.shape) for x in (k, v, w, u))
    return dk, dv, dw, du, dstate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale_u, ctx.bidirectional, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    initial_state = tensors[4]
    if dy is None:
        dy = torch.zeros_like(tensors[1])
    if ctx.bidirectional:
        dfinal = None
    *grads, dstate = wkv_backward_op(dy, dfinal, *tensors, ctx.scale_u, ctx.bidirectional, ctx.chunk_size)
    dinitial = None if initial_state is None else dstate.to(initial_state.dtype)
    return *grads, dinitial, None, None, None, None, None, None


wkv_op.register_autograd(_backward, setup_context=_setup)

FORWARD_PRODUCTS = 2
"""Multiply-adds per token, channel and direction: of the numerator and the denominator."""
BACKWARD_PRODUCTS = 8
"""Both again, their adjoints, dv and the gradient of the log weights, and two for dw."""


@flop_formula("wkv")
def _flops(k: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * FORWARD_PRODUCTS * _directions(args) * k[0] * k[1] * k[2]


@flop_formula("wkv_backward")
def _flops_backward(dy: Any, dfinal: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * BACKWARD_PRODUCTS * _directions(args) * k[0] * k[1] * k[2]


def _directions(args: tuple[Any, ...]) -> int:
    """From the arguments of an op; the last but one says whether it is bidirectional."""
    return 2 if args[-2] else 1


def _one_by_one(
    op: Callable[..., tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Causal packed documents each in a row of its own, for the sake of their states."""
    flat_k, flat_v = (x.flatten(0, 1).unsqueeze(0) for x in (k, v))
    ys, finals = [], []
    for i, (start, end) in enumerate(document_bounds(cu_seqlens)):
        state = None if initial_state is None else initial_state[i : i + 1]
        part = (flat_k[:, start:end], flat_v[:, start:end])
        y, final = op(*part, w, u, state, None, None, None, False, False, chunk_size)
        ys.append(y[0])
        finals.append(final[0])
    return torch.cat(ys).view(v.shape), torch.stack(finals)


def _borders(cu_seqlens: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bool (B, T): first tokens and last tokens of documents; and (B, T): 1 / tokens of the document."""
    bounds = cu_seqlens.long()
    starts, ends = (
        torch.zeros(batch * length, dtype=torch.bool, device=bounds.device).index_fill(0, index, True)
        for index in (bounds[:-1], bounds[1:] - 1)
    )
    lengths = bounds.diff()
    scale = lengths.double().reciprocal().repeat_interleave(lengths, output_size=batch * length)
    return starts.view(batch, length), ends.view(batch, length), scale.view(batch, length)


def wkv_by(
    op: Callable[..., tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool,
    divide_u: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function. op: wkv_op, or another with its arguments."""
    if cu_seqlens is not None and (initial_state is not None or with_final_state):
        y, final_state = _one_by_one(op, k, v, w, u, initial_state, cu_seqlens, chunk_size)
        return y, final_state if with_final_state else None
    starts = ends = scale = None
    if cu_seqlens is not None:
        starts, ends, scale = _borders(cu_seqlens, k.shape[0], k.shape[1])
    if not bidirectional:
        scale = None
    elif scale is None:
        w, u = w / k.shape[1], u / k.shape[1] if divide_u else u
    y, final_state = op(k, v, w, u, initial_state, scale, starts, ends, divide_u, bidirectional, chunk_size)
    return y, final_state if with_final_state else None


wkv = functools.partial(wkv_by, wkv_op)
