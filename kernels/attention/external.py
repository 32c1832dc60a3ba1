"""Adapters to flash-attention 2, 3 and 4.

B batch, T queries, S keys, H heads, G key/value heads, D head dim. Read in the repository
Dao-AILab/flash-attention, commit 0251105 of 2026-08-15: package flash-attn 2.8.4,
`hopper/flash_attn_interface.py` (flash-attn 3) and `flash_attn/cute/interface.py` (flash-attn-4). In all
three the last query meets the last key, a window counts the keys beside a query's own place, and a row that
sees nothing gives zeros.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.attention.limits import Dropout, capability, flash_limits, layout, needs_gradient
from triptych.kernels.library import without_autocast


def _call(
    dense: Callable[..., Any],
    packed: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Any,
    **rest: Any,
) -> Tensor:
    """Call one of a package's two functions; some versions give (out, lse), some out."""
    rest["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if starts is None:
        out = dense(q, k, v, **rest)
    else:
        q_starts, k_starts, q_length, k_length = layout(q, k, starts)
        out = packed(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=q_starts,
            cu_seqlens_k=k_starts,
            max_seqlen_q=q_length,
            max_seqlen_k=k_length,
            **rest,
        )
    out = out[0] if isinstance(out, tuple) else out
    result: Tensor = out.reshape(q.shape)
    return result


def _minus_one(left: int | None, right: int | None) -> tuple[int, int]:
    return (-1 if left is None else left, -1 if right is None else right)


_NO_SINK = "it has no sink"


def supports_2(
    q: Tensor, k: Tensor, v: Tensor, *, sink: Tensor | None, mask: Tensor | None, dropout: Dropout, **_: Any
) -> str | None:
    """Why flash-attention 2 cannot serve the call."""
    if capability(q.device) < (8, 0):
        return "needs compute capability 8.0 (A100) or newer"
    return _NO_SINK if sink is not None else flash_limits(q, k, v, mask, dropout)


@without_autocast
def flash_attention_2(
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
    """flash-attn 2 (read: 2.8.4). Arguments as in the form "reference"."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _call(
        flash_attn_func,
        flash_attn_varlen_func,
        q,
        k,
        v,
        cu_seqlens,
        softmax_scale=scale,
        causal=right == 0,
        window_size=_minus_one(left, right),
        softcap=softcap or 0.0,
    )


def supports_3(
    q: Tensor, k: Tensor, v: Tensor, *, sink: Tensor | None, mask: Tensor | None, dropout: Dropout, **_: Any
) -> str | None:
    """Why flash-attention 3 cannot serve the call."""
    if capability(q.device)[0] != 9:
        return "it is made for compute capability 9.0 (H100, H200)"
    if sink is not None:
        return _NO_SINK
    if q.shape[-1] > 192 and torch.are_deterministic_algorithms_enabled() and needs_gradient(q, k, v):
        return f"it has no deterministic backward for head dim {q.shape[-1]}"
    return flash_limits(q, k, v, mask, dropout)


@without_autocast
def flash_attention_3(
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
    """flash-attn 3 (read: flash_attn_interface of the commit above). Arguments as in the form "reference"."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return _call(
        flash_attn_func,
        flash_attn_varlen_func,
        q,
        k,
        v,
        cu_seqlens,
        softmax_scale=scale,
        causal=right == 0,
        window_size=_minus_one(left, right),
        softcap=softcap or 0.0,
    )


@torch.compiler.assume_constant_result
@functools.cache
def _sink_has_gradient() -> bool:
    """Versions before August 2026 take a sink and give it no gradient."""
    from flash_attn.cute import interface

    return "learnable_sink" in inspect.signature(interface._flash_attn_bwd).parameters


def supports_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout,
    **_: Any,
) -> str | None:
    """Why flash-attention 4 cannot serve the call."""
    major, dim = capability(q.device)[0], q.shape[-1]
    if major not in (9, 10, 11):
        return "it has all of its kernels for compute capabilities 9, 10 and 11 only"
    if major != 9 and dim > 128 and dim != 256:
        return f"on compute capability {major} it takes head dims up to 128, and 256, not {dim}"
    if major != 9 and dim == 256 and (softcap is not None or sink is not None):
        return f"on compute capability {major} it has neither softcap nor sink for head dim 256"
    if sink is not None and sink.dtype == torch.float64:
        return "it takes no sink in double precision"
    if needs_gradient(sink) and not _sink_has_gradient():
        return "this version of it has no gradient of the sink"
    return flash_limits(q, k, v, mask, dropout)


@without_autocast
def flash_attention_4(
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
    """flash-attn-4 (read: flash_attn.cute of the commit above). Arguments as in the form "reference"."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    return _call(
        flash_attn_func,
        flash_attn_varlen_func,
        q,
        k,
        v,
        cu_seqlens,
        softmax_scale=scale,
        causal=right == 0,
        window_size=(left, right),
        softcap=softcap or 0.0,
        learnable_sink=sink,
    )
