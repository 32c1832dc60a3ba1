"""Gated delta rule: linear attention that corrects what its state recalls (DeltaNet, Gated DeltaNet).

B batch, T length, H heads, D channels of queries and keys, E channels of values, docs packed documents.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.gated_delta_rule import examples, limits, reference
from triptych.kernels.gated_delta_rule import torch as fast
from triptych.kernels.library import operator
from triptych.kernels.segments import check_cu_seqlens


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    normalize: bool = False,
    form: str | None = None,
) -> Tensor: ...


@overload
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    normalize: bool = False,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    normalize: bool = False,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Gated DeltaNet (arXiv 2412.06464, equation 10), causal, in chunks:
    S[t] = exp(g[t]) (I - beta[t] k[t] k[t]^T) S[t-1] + beta[t] k[t] v[t]^T, y[t] = scale S[t]^T q[t].

    q, k: (B, T, H, D), v: (B, T, H, E), any float dtype. g: (B, T, H), log of the decay, <= 0 (-inf forgets
    all); None means no decay, the delta rule of arXiv 2406.06484. beta: (B, T, H), from 0 (write nothing) to
    1 (replace what k recalls), to 2 where eigenvalues may be negative. Keys must have length 1 for the
    recurrence to be stable: either the caller sees to it, or normalize divides queries and keys by sqrt(sum
    x^2 + 1e-6), in fp32. scale: None means 1/sqrt(D). initial_state: (B or docs, H, D, E), None means zeros.
    cu_seqlens: packed documents, see `triptych.kernels.segments`; each begins with its own state. chunk_size:
    tokens worked on by one matmul; the result depends on it by rounding only.
    Returns y, shaped and typed like v, and with return_final_state the state after the last token of each row
    or document, in fp32 (fp64 where q, v, g or beta is). Every input and both outputs carry gradients. Decays
    are summed, and triangular systems solved, in fp32 (fp64) whatever the inputs are. Raises ValueError for
    what does not fit.
    """
    _check(q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)
    arguments = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "normalize": normalize,
        "with_final_state": return_final_state,
    }
    chosen = dispatch.choose("gated_delta_rule", form, q.device, q, k, v, g, beta, **arguments)
    y, final_state = chosen.run(q, k, v, g, beta, **arguments)
    return (y, final_state) if return_final_state else y


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> None:
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(
            f"gated_delta_rule: q and k must be (B, T, H, D), they are {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, length, heads, channels = q.shape
    if length == 0:
        raise ValueError(f"gated_delta_rule: q {tuple(q.shape)} has no tokens; T must be at least 1")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"gated_delta_rule: v must be (B, T, H, E) with (B, T, H) = {tuple(q.shape[:3])}, "
            f"it is {tuple(v.shape)}"
        )
    for name, value in (("g", g), ("beta", beta)):
        if value is not None and value.shape != q.shape[:3]:
            raise ValueError(
                f"gated_delta_rule: {name} must be (B, T, H) = {tuple(q.shape[:3])}, "
                f"it is {tuple(value.shape)}"
            )
    if chunk_size < 1:
        raise ValueError(f"gated_delta_rule: chunk_size={chunk_size} must be at least 1; 64 is usual")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    expected = (count, heads, channels, v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"gated_delta_rule: initial_state must be {expected}, it is {tuple(initial_state.shape)}"
        )


dispatch.register(
    "gated_delta_rule",
    external_packages.form(
        "fla", "fla", "triptych.kernels.gated_delta_rule.external", "fla", supports=limits.fla
    ),
)
dispatch.register(
    "gated_delta_rule",
    triton_launch.form(
        "triptych.kernels.gated_delta_rule.triton", "gated_delta_rule", supports=limits.triton
    ),
)
dispatch.register("gated_delta_rule", dispatch.Form("torch", fast.gated_delta_rule))
dispatch.register("gated_delta_rule", dispatch.Form("reference", reference.gated_delta_rule))
dispatch.register_examples("gated_delta_rule", gated_delta_rule, examples.MAKERS)
