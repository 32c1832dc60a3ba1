"""Softmax attention. B batch, T queries, S keys, H heads, G key/value heads, D head dim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triptych.kernels import dispatch, external_packages
from triptych.kernels.attention import examples, external, flex, reference, sdpa, varlen
from triptych.kernels.attention.masks import clip, sides
from triptych.kernels.library import autocast_dtype, operator
from triptych.kernels.segments import check_cu_seqlens


@operator(integers=("cu_seqlens",), free=("mask",))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
    form: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v for each head (arXiv 1706.03762); head h uses the key/value head
    h // (H/G).

    q: (B, T, H, D). k, v: (B, S, G, D), G divides H. causal: the last query meets the last key, so that with
    S > T the first S - T keys are a cache. window: (left, right), how many keys before and after its own a
    query sees; an int w, with causal, is (w - 1, 0). cu_seqlens: packed documents (S = T), none sees another.
    scale: None means 1/sqrt(D). softcap: scores become softcap * tanh(score / softcap) before they are masked
    (arXiv 2408.00118). sink: (H,), a logit for each head that joins the softmax's denominator and no sum
    (arXiv 2508.10925); zeros make the softmax "off by one". mask: broadcasts to (B, H, T, S); bool, True
    where a key is seen, or a bias that is added to the scores, rounded to their dtype, with -inf where a key
    is not seen. dropout: applied to the probabilities (B, H, T, S); only the form "reference" can.

    Everything combines, and q, k, v, sink and a bias have gradients. A query that sees no key gets zeros, and
    gives none of its inputs a gradient. form: "sdpa" and "reference", which materialises the scores, run
    everywhere; "flex", "varlen", "flash_attn", "flash_attn_3" and "flash_attn_4" on GPUs.
    Returns (B, T, H, D) in the common dtype of q, k and v, or autocast's. Raises ValueError for what does not
    fit.
    """
    _check(q, k, v, causal, window, cu_seqlens, softcap, sink, mask)
    dtype = autocast_dtype(q) or torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    left, right = clip(*sides(window, causal), q.shape[1], k.shape[1])
    options = {
        "left": left,
        "right": right,
        "cu_seqlens": cu_seqlens,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap,
        "sink": sink,
        "mask": mask,
        "dropout": dropout,
    }
    return dispatch.choose("attention", form, q.device, q, k, v, **options).run(q, k, v, **options)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | tuple[int, int] | None,
    cu_seqlens: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attention: q must be (B, T, H, D) and k, v (B, S, G, D); they are {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q and k must have one head dim; they are {shapes}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"attention: every size must be at least 1; they are {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: {k.shape[2]} key/value heads do not divide {q.shape[2]} heads; use a divisor"
        )
    if causal and k.shape[1] < q.shape[1]:
        raise ValueError(
            f"attention: causal needs S >= T, the last query meets the last key; they are {shapes}"
        )
    _check_window(window, causal)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap={softcap} must be above 0; None means no cap")
    if sink is not None and sink.shape != (q.shape[2],):
        raise ValueError(f"attention: sink must be (H,) = ({q.shape[2]},), it is {tuple(sink.shape)}")
    if mask is not None:
        _check_mask(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    if cu_seqlens is not None:
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"attention: cu_seqlens needs S = T, without a cache; they are {shapes}")
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])


def _check_window(window: int | tuple[int, int] | None, causal: bool) -> None:
    if isinstance(window, int):
        if window < 1 or not causal:
            raise ValueError(
                f"attention: window={window} must be at least 1, and needs causal=True; use (left, right) "
                "without causal"
            )
    elif window is not None:
        if len(window) != 2 or not all(isinstance(side, int) and side >= 0 for side in window):
            raise ValueError(f"attention: window={window} must be (left, right), two ints of at least 0")
        if causal and window[1]:
            raise ValueError(f"attention: window={window} sees to the right; it needs causal=False")


def _check_mask(mask: Tensor, full: tuple[int, int, int, int]) -> None:
    fits = mask.dim() <= 4 and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1]))
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention: mask must be bool or floating and broadcast to (B, H, T, S) = {full}; "
            f"it is {mask.dtype}, {tuple(mask.shape)}"
        )


for _name, _package, _run, _supports in (
    ("flash_attn_4", "flash_attn.cute", "flash_attention_4", external.supports_4),
    ("flash_attn_3", "flash_attn_interface", "flash_attention_3", external.supports_3),
    ("flash_attn", "flash_attn_2_cuda", "flash_attention_2", external.supports_2),
):
    dispatch.register(
        "attention", external_packages.form(_name, _package, external.__name__, _run, supports=_supports)
    )
dispatch.register(
    "attention",
    dispatch.Form(
        "varlen", varlen.attention, supports=varlen.supports, installed=varlen.installed, trusted=False
    ),
)
dispatch.register("attention", dispatch.Form("sdpa", sdpa.attention, supports=sdpa.supports))
dispatch.register(
    "attention",
    dispatch.Form(
        "flex",
        flex.attention,
        supports=flex.supports,
        installed=flex.installed,
        # A check before its first use would compile it for every example, which takes minutes.
        trusted=True,
        by_name_only=flex.by_name_only,
    ),
)
dispatch.register("attention", dispatch.Form("reference", reference.attention))
dispatch.register_examples("attention", attention, examples.MAKERS)
