"""Causal depthwise convolution as K shifted multiply-adds, activation included; saves its inputs only.

B batch, T length, S length with history, C channels, K taps, docs documents.
Documents are separated by laying them out with K-1 rows of history (their initial state or zeros) before
each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, history: int) -> Tensor:
    """z (B, S - history, C): z[t] = bias + sum_k weight[:, K-1-k] x[t + history - k], zeros before it."""
    taps, length = weight.shape[1], x.shape[1]
    z = x[:, history:] * weight[:, taps - 1]
    if bias is not None:
        z += bias
    for k in range(1, taps):
        first = max(history, k)
        if first < length:
            z[:, first - history :].addcmul_(x[:, first - k : length - k], weight[:, taps - 1 - k])
    return z


@define("causal_conv1d")
def causal_conv1d_op(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: int) -> Tensor:
    """y (B, S - history, C) of x's dtype; the first `history` rows of x are only looked back at."""
    dtype = statistics_dtype(x, weight)
    z = _convolve(x.contiguous().to(dtype), weight.to(dtype), bias, history)
    return (F.silu(z, inplace=True) if silu else z).to(x.dtype)


@causal_conv1d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - history, x.shape[2])


@define("causal_conv1d_backward")
def causal_conv1d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias (empty where there is no bias)."""
    dtype = statistics_dtype(x, weight)
    wide, weight_ = x.contiguous().to(dtype), weight.to(dtype)
    dz = dy.contiguous().to(dtype)
    if silu:
        dz = torch.ops.aten.silu_backward(dz, _convolve(wide, weight_, bias, history))
    taps, length = weight.shape[1], x.shape[1]
    dx = wide.new_zeros(wide.shape)
    dweight = torch.zeros_like(weight_)
    for k in range(min(taps, length)):
        first = max(history, k)
        late, early = dz[:, first - history :], slice(first - k, length - k)
        dx[:, early].addcmul_(late, weight_[:, taps - 1 - k])
        dweight[:, taps - 1 - k] = (late * wide[:, early]).sum((0, 1))
    dbias = dz.new_empty(0) if bias is None else dz.sum((0, 1)).to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias


@causal_conv1d_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: int
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = dy.new_empty(0, dtype=statistics_dtype(x, weight)) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.silu, ctx.history = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = causal_conv1d_backward_op(dy, x, weight, bias, ctx.silu, ctx.history)
    return dx, dweight, None if bias is None else dbias, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("causal_conv1d")
def _flops(x: Any, weight: Any, bias: Any, silu: bool, history: int, *args: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * batch * (length - history) * channels * weight[1]


@flop_formula("causal_conv1d_backward")
def _flops_backward(
    dy: Any, x: Any, weight: Any, bias: Any, silu: bool, history: int, *args: Any, **kwargs: Any
) -> int:
    return 2 * _flops(x, weight, bias, silu, history)


def _packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor,
    final: bool,
) -> tuple[Tensor, Tensor | None]:
    """All documents in one row, each behind its own history."""
    batch, length, channels = x.shape
    look_back = weight.shape[1] - 1
    ends = cu_seqlens[1:].long()
    documents = torch.arange(ends.numel(), device=x.device)
    tokens = torch.arange(batch * length, device=x.device)
    rows = tokens + (torch.searchsorted(ends, tokens, right=True) + 1) * look_back
    # The K-1 rows before each document, and the last K-1 of it (its history where it is shorter).
    offsets = torch.arange(look_back, device=x.device)
    before = (cu_seqlens[:-1].long() + documents * look_back).unsqueeze(-1) + offsets
    last = (ends + documents * look_back).unsqueeze(-1) + offsets
    laid_out = x.new_zeros(batch * length + ends.numel() * look_back, channels)
    laid_out = laid_out.index_copy(0, rows, x.reshape(-1, channels))
    if state is not None:
        laid_out = laid_out.index_copy(0, before.flatten(), state.transpose(1, 2).flatten(0, 1).to(x.dtype))
    y = causal_conv1d_op(laid_out.unsqueeze(0), weight, bias, silu, 0)
    y = y[0].index_select(0, rows).view(x.shape)
    return y, laid_out[last].transpose(1, 2) if final else None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    silu, look_back = activation == "silu", weight.shape[1] - 1
    if cu_seqlens is not None:
        return _packed(x, weight, bias, silu, initial_state, cu_seqlens, with_final_state)
    if initial_state is None and not with_final_state:
        return causal_conv1d_op(x, weight, bias, silu, 0), None
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], look_back)
    x = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)
    y = causal_conv1d_op(x, weight, bias, silu, look_back)
    return y, x[:, x.shape[1] - look_back :].transpose(1, 2) if with_final_state else None
