"""A sink in attention whose kernel knows none: its result is rescaled by the log-sum-exp that it also gives.

B batch, T queries, S keys, H heads, G key/value heads, D head dim.

With l = log sum_j e^s_j over the keys and z the sink's logit, the softmax with the sink has the log-sum-exp
L = log(e^l + e^z) and the result y' = y e^(l - L). Flash attention's backward computes p_j = e^(s_j - l) and
ds_j = p_j (dy . v_j - dy . y) from whatever l and y it is given: with L and y' it gives the gradients with
the sink, and dz is -e^(z - L) dy . y' summed over queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from triptych.kernels.library import define, flop_formula

flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Full scores and context, masked or not, as PyTorch counts its other fused forms; q is (B, H, T, D)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def flops_backward(dout: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """The scores again, dv, dprobabilities, dq and dk."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


# PyTorch has formulas for its CUDA forms only.
if flash_cpu not in flop_registry:
    register_flop_formula(flash_cpu)(flops)
    register_flop_formula(_flash_cpu_backward)(flops_backward)


def rescaled(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) without the sink, (..., D) and (...), to those with it; sink broadcasts to lse."""
    total = torch.logaddexp(lse, sink.to(lse.dtype))
    return (out * torch.exp(lse - total).unsqueeze(-1)).to(out.dtype), total


def sink_gradient(dout: Tensor, out: Tensor, total: Tensor, sink: Tensor) -> Tensor:
    """By query, shaped like `total`; to be summed to the sink's shape."""
    along = (dout.to(total.dtype) * out.to(total.dtype)).sum(-1)
    return -torch.exp(sink.to(total.dtype) - total) * along


def dense(x: Tensor) -> Tensor:
    """The kernels step through a head's numbers one by one, whatever the stride is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)


@define("attention_sink")
def attention_sink_op(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D), k, v (B, G, S, D), sink (H,) -> out (B, H, T, D), log-sum-exp (B, H, T); on the CPU."""
    q, k, v = dense(q), dense(k), dense(v)
    out, lse = flash_cpu(q, k, v, 0.0, causal, attn_mask=_bias(mask, q), scale=scale)
    out, total = rescaled(out, lse, sink.unsqueeze(-1))
    return out.contiguous(), total.contiguous()


@attention_sink_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=dtype)


@define("attention_sink_backward")
def attention_sink_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsink."""
    dout, q, k, v = dense(dout), dense(q), dense(k), dense(v)
    dq, dk, dv = _flash_cpu_backward(
        dout, q, k, v, out, total, 0.0, causal, attn_mask=_bias(mask, q), scale=scale
    )
    dsink = sink_gradient(dout, out, total, sink.unsqueeze(-1)).sum((0, 2)).to(sink.dtype)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dsink


@attention_sink_backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sink.new_empty(sink.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_sink_backward_op(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return (*gradients, None, None, None)


attention_sink_op.register_autograd(_backward, setup_context=_save)
flop_formula("attention_sink")(flops)
flop_formula("attention_sink_backward")(flops_backward)


def attention_with_sink(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """On the CPU: q (B, H, T, D), k, v (B, G, S, D), sink (H,) -> (B, H, T, D). The mask has no gradient."""
    out: Tensor = attention_sink_op(q, k, v, sink, mask, causal, scale)[0]
    return out
