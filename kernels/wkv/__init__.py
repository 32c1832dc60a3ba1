"""WKV, the attention-free mixing of RWKV-4, in both directions or causal.

B batch, T length, C channels, docs packed documents.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.library import operator
from triptych.kernels.segments import check_cu_seqlens
from triptych.kernels.wkv import examples, reference
from triptych.kernels.wkv import torch as fast


@overload
def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool = True,
    divide_u: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 32,
    form: str | None = None,
) -> Tensor: ...


@overload
def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool = True,
    divide_u: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 32,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool = True,
    divide_u: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 32,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each channel's mean of v, weighted by exp(k) and a decay with the distance (Vision-RWKV,
    arXiv 2403.02308, equation 3):
    y[t] = sum_i exp(e[t, i]) v[i] / sum_i exp(e[t, i]), with e[t, t] = u + k[t] and for i != t
    e[t, i] = k[i] - (|t - i| - 1) w / T, T the number of tokens of the row or document.
    bidirectional=False is RWKV-4 (arXiv 2305.13048): i <= t only, and w is not divided by T.

    k, v: (B, T, C), any float dtype. w, u: (C,), of either sign: w > 0 forgets with the distance, w < 0
    prefers what is far. They are `spatial_decay` and `spatial_first` of the published Vision-RWKV and
    Diffusion-RWKV; of RWKV-4, w is exp(time_decay). divide_u: divide u by T as well, as the published code
    does and the paper's equation does not; bidirectional only. initial_state, causal only: (B or docs, 2, C),
    of all that came before the mean of v and the logarithm of the sum of the weights, as the first token sees
    them; None is nothing, which the pair (0, -inf) says too. cu_seqlens: packed documents, see
    `triptych.kernels.segments`. chunk_size: tokens of a chunk; the result depends on it by rounding only.
    Returns y, shaped and typed like v, and with return_final_state the state behind the last token of each
    row or document, in fp32 (fp64 where k, v or w is). Every input and both outputs carry gradients. Sums are
    in fp32 (fp64) and relative to their largest weight, whatever k is. Raises ValueError for what does not
    fit.
    """
    _check(k, v, w, u, initial_state, cu_seqlens, chunk_size)
    if bidirectional and (initial_state is not None or return_final_state):
        raise ValueError(
            "wkv: a state goes one way only, and bidirectional=True reads in both; "
            "leave initial_state and return_final_state out, or use bidirectional=False"
        )
    if divide_u and not bidirectional:
        raise ValueError(
            "wkv: divide_u=True divides by T, which bidirectional=False does not know; use divide_u=False"
        )
    y, final_state = dispatch.choose("wkv", form, k.device, k, v, w, u).run(
        k,
        v,
        w,
        u,
        bidirectional=bidirectional,
        divide_u=divide_u,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        with_final_state=return_final_state,
    )
    return (y, final_state) if return_final_state else y


def _check(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> None:
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"wkv: k and v must both be (B, T, C), they are {tuple(k.shape)} and {tuple(v.shape)}"
        )
    batch, length, channels = k.shape
    if length == 0:
        raise ValueError(f"wkv: k {tuple(k.shape)} has no tokens; T must be at least 1")
    for name, value in (("w", w), ("u", u)):
        if value.shape != (channels,):
            raise ValueError(f"wkv: {name} must be (C,) = ({channels},), it is {tuple(value.shape)}")
    if chunk_size < 1:
        raise ValueError(f"wkv: chunk_size={chunk_size} must be at least 1; 32 is usual")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    expected = (count, 2, channels)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"wkv: initial_state must be {expected}, it is {tuple(initial_state.shape)}")


dispatch.register("wkv", triton_launch.form("triptych.kernels.wkv.triton", "wkv"))
dispatch.register("wkv", dispatch.Form("torch", fast.wkv))
dispatch.register("wkv", dispatch.Form("reference", reference.wkv))
dispatch.register_examples("wkv", wkv, examples.MAKERS)
