"""Attention through the flash-attention kernels within PyTorch for CUDA, those of torch.nn.attention.varlen.

B batch, T queries, S keys, H heads, G key/value heads, D head dim. Rows are laid end to end, as packed
documents are. The operators are called below `varlen_attn`, whose arguments changed from 2.11 to 2.13 while
theirs did not, and which gives no gradient to the log-sum-exp that a sink needs; see `log_sum_exp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.attention.limits import Dropout, flash_limits, layout
from triptych.kernels.attention.log_sum_exp import dense, rescaled, sink_gradient
from triptych.kernels.library import define, flop_formula, without_autocast


def installed(device: torch.device) -> str | None:
    """Why this form cannot run on such a device."""
    if device.type != "cuda":
        return "PyTorch has flash-attention kernels of this kind for CUDA only"
    if torch.version.hip is not None:
        return "PyTorch's kernels for ROCm lay the log-sum-exp out otherwise"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100) or newer"
    return None


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int | None,
    right: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout,
) -> str | None:
    """Why this form cannot serve the call."""
    square = q.shape[1] == k.shape[1]
    everything = left is None and (right is None or (right == 0 and square))
    if cu_seqlens is None and sink is None and everything:
        return "it is for documents, windows, caches and sinks; 'sdpa' has the best kernel for a plain batch"
    if softcap is not None:
        return "PyTorch's flash-attention kernels have no softcap"
    return flash_limits(q, k, v, mask, dropout)


@define("attention_varlen")
def attention_varlen_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    sink: Tensor | None,
    q_length: int,
    k_length: int,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q (tokens, H, D), k, v (tokens, G, D), starts int32 (documents + 1,), sink (H,), the greatest lengths,
    left and right -1 for all -> out (tokens, H, D), log-sum-exp (H, tokens) fp32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        q_starts,
        k_starts,
        q_length,
        k_length,
        0.0,
        right == 0 and left < 0,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    if sink is None:
        return out.contiguous(), lse
    out, total = rescaled(out, lse.T, sink)
    return out.contiguous(), total.T.contiguous()


@attention_varlen_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    sink: Tensor | None,
    q_length: int,
    k_length: int,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@define("attention_varlen_backward")
def attention_varlen_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    sink: Tensor | None,
    out: Tensor,
    total: Tensor,
    q_length: int,
    k_length: int,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsink (empty without a sink)."""
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dense(dout),
        q,
        k,
        v,
        out,
        total,
        q_starts,
        k_starts,
        q_length,
        k_length,
        0.0,
        right == 0 and left < 0,
        q.new_zeros(2, dtype=torch.uint64),  # states of the generator of a dropout there is not
        q.new_empty(0),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    if sink is None:
        dsink = q.new_empty(0)
    else:
        dsink = sink_gradient(dout, out, total.T, sink).sum(0).to(sink.dtype)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dsink


@attention_varlen_backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    sink: Tensor | None,
    out: Tensor,
    total: Tensor,
    q_length: int,
    k_length: int,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.rest = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    *gradients, dsink = attention_varlen_backward_op(dout, *ctx.saved_tensors, *ctx.rest)
    with_sink = ctx.saved_tensors[5] is not None
    return (*gradients, None, None, dsink if with_sink else None, *(None for _ in ctx.rest))


attention_varlen_op.register_autograd(_backward, setup_context=_save)


def _scores(q: Any, k_length: int, left: int, right: int) -> int:
    """Scores that are worked out: with all keys of the longest document, or with those in the window."""
    seen = k_length if left < 0 or right < 0 else min(k_length, left + right + 1)
    return int(q[0] * q[1] * seen)


@flop_formula("attention_varlen")
def _flops(q: Any, k: Any, v: Any, *rest: Any, **others: Any) -> int:
    *_, k_length, left, right, _scale = rest
    return 2 * _scores(q, k_length, left, right) * (q[2] + v[2])


@flop_formula("attention_varlen_backward")
def _flops_backward(dout: Any, q: Any, k: Any, v: Any, *rest: Any, **others: Any) -> int:
    *_, k_length, left, right, _scale = rest
    return 2 * _scores(q, k_length, left, right) * (3 * q[2] + 2 * v[2])


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int | None,
    right: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout,
) -> Tensor:
    """Arguments as in the form "reference"."""
    q_starts, k_starts, q_length, k_length = layout(q, k, cu_seqlens)
    left, right = (-1 if side is None else side for side in (left, right))
    flat = (dense(x.flatten(0, 1)) for x in (q, k, v))
    out = attention_varlen_op(*flat, q_starts, k_starts, sink, q_length, k_length, left, right, scale)[0]
    return out.view(*q.shape[:3], -1)
