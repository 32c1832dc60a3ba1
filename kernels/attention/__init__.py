"""Softmax attention. B batch, T queries, S keys, H heads, G key/value heads, D head dim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.attention import reference, sdpa
from triptych.kernels.library import autocast_dtype
from triptych.kernels.segments import check_cu_seqlens

dispatch.register("attention", dispatch.Form("sdpa", sdpa.attention, supports=sdpa.supports))
dispatch.register("attention", dispatch.Form("reference", reference.attention))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
    form: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v for each head (arXiv 1706.03762); head h uses the key/value head
    h // (H/G).

    q: (B, T, H, D). k, v: (B, S, G, D), G divides H. causal: the last query meets the last key, so that with
    S > T the first S - T keys are a cache. window: a query sees itself and the window - 1 keys before it.
    cu_seqlens: packed documents (S = T), none sees another. scale: None means 1/sqrt(D). dropout: applied to
    the probabilities (B, H, T, S); only the form "reference" can. form: "sdpa" (default) or "reference",
    which materialises the scores.
    Returns (B, T, H, D) in the inputs' common dtype, or autocast's. Raises ValueError for what does not fit.
    """
    _check(q, k, v, causal, window, cu_seqlens)
    dtype = autocast_dtype(q) or torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if window is not None and window >= k.shape[1]:
        window = None
    options = {
        "causal": causal,
        "window": window,
        "cu_seqlens": cu_seqlens,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "dropout": dropout,
    }
    return dispatch.choose("attention", form, q.device, q, k, v, **options).run(q, k, v, **options)


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, cu_seqlens: Tensor | None
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attention: q must be (B, T, H, D) and k, v (B, S, G, D); they are {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q and k must have one head dim; they are {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: {k.shape[2]} key/value heads do not divide {q.shape[2]} heads; use a divisor"
        )
    if causal and k.shape[1] < q.shape[1]:
        raise ValueError(
            f"attention: causal needs S >= T, the last query meets the last key; they are {shapes}"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: window={window} must be at least 1, and needs causal=True")
    if cu_seqlens is not None:
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"attention: cu_seqlens needs S = T, without a cache; they are {shapes}")
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
