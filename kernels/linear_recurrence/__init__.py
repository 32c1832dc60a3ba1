"""The element-wise linear recurrence of minGRU, minLSTM and HGRN.

B batch, T length, D channels, docs packed documents.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.library import operator
from triptych.kernels.linear_recurrence import examples, reference
from triptych.kernels.linear_recurrence import torch as fast
from triptych.kernels.linear_recurrence.limits import fla_lacks
from triptych.kernels.segments import check_cu_seqlens


@overload
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    log_decay: bool = False,
    chunk_size: int = 32,
    form: str | None = None,
) -> Tensor: ...


@overload
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    log_decay: bool = False,
    chunk_size: int = 32,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    log_decay: bool = False,
    chunk_size: int = 32,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h[t] = a[t] h[t-1] + b[t], each channel for itself: the recurrence of minGRU and minLSTM
    (arXiv 2410.01201) and of HGRN (arXiv 2311.04823).

    a, b: (B, T, D), any float dtypes. a: any real number, zero and negative ones too; with log_decay it is
    the logarithm of the decay, as HGRN's code has it: bf16 tells decays near 1 apart only by their logarithms
    (0.996 and 1 are neighbours), and no decay need be kept beside its logarithm for backward.
    initial_state: (B or docs, D), None means zeros. cu_seqlens: packed documents, see
    `triptych.kernels.segments`; each begins with its own state. chunk_size: tokens of a chunk; the result
    depends on it by rounding only, the Triton form not at all.
    Returns h, shaped and typed like b, and with return_final_state the state after the last token of each row
    or document, in fp32 (fp64 where a or b is). a, b, the initial state and both outputs carry gradients. The
    recurrence runs in fp32 (fp64) whatever the inputs are. Raises ValueError for what does not fit.
    """
    _check(a, b, initial_state, cu_seqlens, chunk_size)
    arguments = {
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "log_decay": log_decay,
        "chunk_size": chunk_size,
        "with_final_state": return_final_state,
    }
    chosen = dispatch.choose("linear_recurrence", form, b.device, a, b, **arguments)
    h, final_state = chosen.run(a, b, **arguments)
    return (h, final_state) if return_final_state else h


def _check(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int
) -> None:
    if b.dim() != 3 or a.shape != b.shape:
        raise ValueError(
            f"linear_recurrence: a and b must both be (B, T, D); "
            f"they are {tuple(a.shape)} and {tuple(b.shape)}"
        )
    batch, length, channels = b.shape
    if length == 0:
        raise ValueError(f"linear_recurrence: b {tuple(b.shape)} has no tokens; T must be at least 1")
    if chunk_size < 1:
        raise ValueError(f"linear_recurrence: chunk_size={chunk_size} must be at least 1; 32 is usual")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    if initial_state is not None and initial_state.shape != (count, channels):
        raise ValueError(
            f"linear_recurrence: initial_state must be {(count, channels)}, "
            f"it is {tuple(initial_state.shape)}"
        )


# fla's kernels pass over memory several times; they come after ours.
dispatch.register(
    "linear_recurrence",
    triton_launch.form("triptych.kernels.linear_recurrence.triton", "linear_recurrence"),
)
dispatch.register(
    "linear_recurrence",
    external_packages.form(
        "fla",
        "fla",
        "triptych.kernels.linear_recurrence.external",
        "linear_recurrence",
        supports=fla_lacks,
    ),
)
dispatch.register("linear_recurrence", dispatch.Form("torch", fast.linear_recurrence))
dispatch.register("linear_recurrence", dispatch.Form("reference", reference.linear_recurrence))
dispatch.register_examples("linear_recurrence", linear_recurrence, examples.MAKERS)
