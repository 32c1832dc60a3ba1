"""mLSTM: an LSTM with a matrix for its memory (xLSTM).

B batch, T length, H heads, D channels of queries and keys, E channels of values, docs packed documents.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.library import operator
from triptych.kernels.mlstm import examples, limits, reference
from triptych.kernels.mlstm import torch as fast
from triptych.kernels.segments import check_cu_seqlens

State = tuple[Tensor, Tensor]
"""Memory (B or docs, H, D, E + 1), whose last column is the normaliser n, and m (B or docs, H): what the
memory stands for is exp(m) times it. Both in fp32, or fp64."""


@overload
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor: ...


@overload
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> tuple[Tensor, State]: ...


@operator()
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTM cell (arXiv 2405.04517, equations 19 to 27), causal, in chunks:
    C[t] = f C[t-1] + i k v^T, n[t] = f n[t-1] + i k, y[t] = scale q C[t] / max(|scale q.n[t]|, 1),
    with i = exp(igate[t]) and f = sigmoid(fgate[t]).

    C and n are kept divided by exp(m), m[t] = max(log f + m[t-1], log i), so that nothing overflows; y does
    not depend on m. q, k: (B, T, H, D), v: (B, T, H, E), any float dtype. igate, fgate: (B, T, H). scale:
    None means 1/sqrt(D). initial_state: see State; None means zeros. cu_seqlens: packed documents, see
    `triptych.kernels.segments`; each begins with its own state. chunk_size: tokens worked on by one matmul;
    the result depends on it by rounding only.
    Returns y, shaped and typed like v, and with return_final_state the state after the last token of each row
    or document. Every input and every output carries gradients; m of the final state has none, as what the
    state stands for does not depend on how it is divided. Raises ValueError for what does not fit.
    Differs from the published code, which adds 1e-6 to the denominator.
    """
    _check(q, k, v, igate, fgate, initial_state, cu_seqlens, chunk_size)
    arguments = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "with_final_state": return_final_state,
    }
    tensors = (q, k, v, igate, fgate)
    y, final_state = dispatch.choose("mlstm", form, q.device, *tensors, **arguments).run(
        *tensors, **arguments
    )
    return (y, final_state) if return_final_state else y


@operator()
def mlstm_step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, State]:
    """One token of the recurrence, for generation.

    state: of B rows. q, k: (B, H, D). v: (B, H, E). igate, fgate: (B, H).
    Returns y (B, H, E) of v's dtype and the new state; `state` itself is left as it is.
    """
    memory, m = state
    expected = (*k.shape, v.shape[-1] + 1)
    if q.dim() != 3 or q.shape != k.shape or memory.shape != expected or m.shape != igate.shape:
        raise ValueError(
            "mlstm_step: memory must be (B, H, D, E + 1), m and gates (B, H), q and k (B, H, D), v (B, H, E);"
            f" they are {', '.join(str(tuple(x.shape)) for x in (memory, m, igate, fgate, q, k, v))}"
        )
    by_token = (x.unsqueeze(1) for x in (q, k, v, igate, fgate))
    y, state = reference.scan(*by_token, scale=q.shape[-1] ** -0.5 if scale is None else scale, state=state)
    return y[:, 0].to(v.dtype), state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> None:
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(
            f"mlstm: q and k must be (B, T, H, D), they are {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, length, heads, channels = q.shape
    if length == 0:
        raise ValueError(f"mlstm: q {tuple(q.shape)} has no tokens; T must be at least 1")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"mlstm: v must be (B, T, H, E) with (B, T, H) = {tuple(q.shape[:3])}, it is {tuple(v.shape)}"
        )
    for name, gate in (("igate", igate), ("fgate", fgate)):
        if gate.shape != q.shape[:3]:
            raise ValueError(
                f"mlstm: {name} must be (B, T, H) = {tuple(q.shape[:3])}, it is {tuple(gate.shape)}"
            )
    if chunk_size < 1:
        raise ValueError(f"mlstm: chunk_size={chunk_size} must be at least 1; 64 is usual")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    if initial_state is None:
        return
    expected = (count, heads, channels, v.shape[3] + 1)
    memory, m = initial_state
    if memory.shape != expected or m.shape != expected[:2]:
        raise ValueError(
            f"mlstm: initial_state must be a memory {expected} and m {expected[:2]}, "
            f"they are {tuple(memory.shape)} and {tuple(m.shape)}"
        )


dispatch.register(
    "mlstm", triton_launch.form("triptych.kernels.mlstm.triton", "mlstm", supports=limits.triton)
)
dispatch.register("mlstm", dispatch.Form("torch", fast.mlstm))
dispatch.register("mlstm", dispatch.Form("reference", reference.mlstm))
dispatch.register_examples("mlstm", mlstm, examples.MAKERS)
