"""Attention through PyTorch's scaled_dot_product_attention, itself a registered operator with a fused form.

B batch, T queries, S keys, H heads, G key/value heads, D head dim. Packed documents of one length form a
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from triptych.kernels.attention.masks import visible
from triptych.kernels.library import without_autocast
from triptych.kernels.segments import document_bounds

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Full scores and context, masked or not, as PyTorch counts its other fused forms; q is (B, H, T, D)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _flops_backward(dout: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """The scores again, dv, dprobabilities, dq and dk."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


# PyTorch has formulas for its CUDA forms only.
if _flash_cpu not in flop_registry:
    register_flop_formula(_flash_cpu)(_flops)
    register_flop_formula(_flash_cpu_backward)(_flops_backward)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Tensor:
    """One batch of equal lengths, (B, T, H, D) in and out."""
    length, keys = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "meta":
        # PyTorch would take the form with materialised scores; count and save as the fused one does.
        return _flash_cpu(q, k, v, 0.0, causal, scale=scale)[0].transpose(1, 2)
    if causal and length == keys and (window is None or window >= keys):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        mask = visible(length, keys, causal=causal, window=window, device=q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, cu_seqlens: Tensor
) -> Tensor:
    """Sort documents by length, attend within each batch of one length, and put the tokens back."""
    starts_of: dict[int, list[int]] = {}
    for start, end in document_bounds(cu_seqlens):
        starts_of.setdefault(end - start, []).append(start)
    q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
    if len(starts_of) == 1:
        (length,) = starts_of
        q_, k_, v_ = (x.unflatten(0, (-1, length)) for x in (q_, k_, v_))
        return _attend(q_, k_, v_, causal, window, scale).reshape(*q.shape[:3], -1)
    order = torch.cat(
        [(torch.tensor(s).unsqueeze(1) + torch.arange(n)).flatten() for n, s in starts_of.items()]
    )
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    order, back = order.to(q.device), back.to(q.device)
    sizes = [n * len(starts) for n, starts in starts_of.items()]
    parts = zip(starts_of, *(x.index_select(0, order).split(sizes) for x in (q_, k_, v_)))
    outs = [
        _attend(*(x.unflatten(0, (-1, n)) for x in part), causal, window, scale).flatten(0, 1)  # type: ignore[call-arg]
        for n, *part in parts
    ]
    return torch.cat(outs).index_select(0, back).view(*q.shape[:3], -1)


def supports(
    q: Tensor, k: Tensor, v: Tensor, *, dropout: Callable[[Tensor], Tensor] | None, **_: Any
) -> str | None:
    """Why this form cannot serve the call."""
    if dropout is not None:
        return "its dropout would draw from the device's generator, not from the sample keys"
    return None


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Shapes as in the public function."""
    if cu_seqlens is not None and cu_seqlens.device.type != "meta":
        return _packed(q, k, v, causal, window, scale, cu_seqlens)
    return _attend(q, k, v, causal, window, scale)
