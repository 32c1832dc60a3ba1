"""Causal depthwise convolution as K shifted multiply-adds, activation included; saves its inputs only.

B batch, T length, S length with history, C channels, K taps, docs documents.
Packed documents are convolved as if they were one, and the first K-1 tokens of each are put right afterwards;
where they have initial states, they are laid out with these before each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, history: int, heads: Tensor | None) -> Tensor:
    """z (B, S - history, C): z[t] = bias + sum_k weight[:, K-1-k] x[t + history - k], zeros before it.

    heads: (K-1, docs), where there are documents; x and z are then one row.
    """
    taps, length = weight.shape[1], x.shape[1]
    z = x[:, history:] * weight[:, taps - 1]
    if bias is not None:
        z += bias
    for k in range(1, taps):
        first = max(history, k)
        if first < length:
            z[:, first - history :].addcmul_(x[:, first - k : length - k], weight[:, taps - 1 - k])
    if heads is not None:
        # The first tokens last: what a short document lacks has been written to its first.
        for m in reversed(range(min(taps - 1, length))):
            of_document = x[0, heads[m]] * weight[:, taps - 1]
            if bias is not None:
                of_document += bias
            for k in range(1, m + 1):
                of_document.addcmul_(x[0, heads[m - k]], weight[:, taps - 1 - k])
            z[0].index_copy_(0, heads[m], of_document)
    return z


def _one_row(x: Tensor, heads: Tensor | None) -> Tensor:
    """x, all its rows behind each other where there are documents."""
    return x.contiguous() if heads is None else x.reshape(1, -1, x.shape[2])


@define("causal_conv1d")
def causal_conv1d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor | None, silu: bool, history: int
) -> Tensor:
    """y (B, S - history, C) of x's dtype; the first `history` rows of x are only looked back at.

    heads: int64 (K-1, docs), numbers among the B*S tokens of each document's first K-1, or of its very first
    for those it lacks. Either history is 0 or there are no documents.
    """
    dtype = statistics_dtype(x, weight)
    z = _convolve(_one_row(x, heads).to(dtype), weight.to(dtype), bias, history, heads)
    y = (F.silu(z, inplace=True) if silu else z).to(x.dtype)
    return y.view(x.shape[0], x.shape[1] - history, x.shape[2])


@causal_conv1d_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor | None, silu: bool, history: int
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - history, x.shape[2])


@define("causal_conv1d_backward")
def causal_conv1d_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: Tensor | None,
    silu: bool,
    history: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias (empty where there is no bias)."""
    dtype = statistics_dtype(x, weight)
    wide, weight_ = _one_row(x, heads).to(dtype), weight.to(dtype)
    dz = _one_row(dy, heads).to(dtype)
    if silu:
        dz = torch.ops.aten.silu_backward(dz, _convolve(wide, weight_, bias, history, heads))
    elif heads is not None:
        dz = dz.clone()
    dbias = dz.new_empty(0) if bias is None else dz.sum((0, 1)).to(bias.dtype)
    taps, length = weight.shape[1], wide.shape[1]
    dx = wide.new_zeros(wide.shape)
    dweight = torch.zeros_like(weight_)
    for k in range(min(taps, length)):
        if k and heads is not None:
            # Tokens that have fewer than k others of their document before them.
            dz[0].index_fill_(0, heads[k - 1], 0.0)
        first = max(history, k)
        late, early = dz[:, first - history :], slice(first - k, length - k)
        dx[:, early].addcmul_(late, weight_[:, taps - 1 - k])
        dweight[:, taps - 1 - k] = (late * wide[:, early]).sum((0, 1))
    return dx.view(x.shape).to(x.dtype), dweight.to(weight.dtype), dbias


@causal_conv1d_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: Tensor | None,
    silu: bool,
    history: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = dy.new_empty(0, dtype=statistics_dtype(x, weight)) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.history = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, heads = ctx.saved_tensors
    dx, dweight, dbias = causal_conv1d_backward_op(dy, x, weight, bias, heads, ctx.silu, ctx.history)
    return dx, dweight, None if bias is None else dbias, None, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("causal_conv1d")
def _flops(
    x: Any, weight: Any, bias: Any, heads: Any, silu: bool, history: int, *args: Any, **kwargs: Any
) -> int:
    batch, length, channels = x
    return 2 * batch * (length - history) * channels * weight[1]


@flop_formula("causal_conv1d_backward")
def _flops_backward(dy: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(x, weight, *args)


def _heads(cu_seqlens: Tensor, look_back: int) -> Tensor:
    """What the op takes: (K-1, docs)."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:]
    heads = starts + torch.arange(look_back, device=starts.device).unsqueeze(1)
    return torch.where(heads < ends, heads, starts)


def _with_states(
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
    y = causal_conv1d_op(laid_out.unsqueeze(0), weight, bias, None, silu, 0)
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
    if initial_state is None and not with_final_state:
        heads = None if cu_seqlens is None or look_back == 0 else _heads(cu_seqlens, look_back)
        return causal_conv1d_op(x, weight, bias, heads, silu, 0), None
    if cu_seqlens is not None:
        return _with_states(x, weight, bias, silu, initial_state, cu_seqlens, with_final_state)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], look_back)
    x = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)
    y = causal_conv1d_op(x, weight, bias, None, silu, look_back)
    return y, x[:, x.shape[1] - look_back :].transpose(1, 2) if with_final_state else None
