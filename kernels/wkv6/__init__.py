"""WKV, the matrix-valued recurrence of RWKV-6, causal or in both directions.

B batch, T length, H heads, D key dim, E value dim, docs packed documents.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.gated_linear_attention.checks import check, supported_by_fla, supported_by_triton
from triptych.kernels.library import operator
from triptych.kernels.wkv6 import examples, reference
from triptych.kernels.wkv6 import torch as fast


@overload
def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor: ...


@overload
def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool = False,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of RWKV-6 (arXiv 2404.05892, section 4.2), in chunks:
    y[t] = scale (S[t-1] + diag(u) k[t] v[t]^T)^T r[t], S[t] = diag(exp w[t]) S[t-1] + k[t] v[t]^T.
    bidirectional adds to S[t-1] the state that runs from the end and holds the tokens behind t.

    r, k: (B, T, H, D), any float dtype. v: (B, T, H, E). w: (B, T, H, D), the logarithm of the decays, <= 0
    (-inf forgets all); of the published models, w = -exp(their w). u: (H, D), the bonus of the token itself.
    scale: 1 in the paper. initial_state, not bidirectional: (B or docs, H, D, E), None means zeros.
    cu_seqlens: packed documents, see `triptych.kernels.segments`; each begins with its own state. chunk_size:
    tokens worked on by one matmul, a power of two; the result depends on it by rounding only.
    Returns y, shaped and typed like v, and with return_final_state the state behind the last token of each
    row or document, in fp32 (fp64 where an input is). Every input and both outputs carry gradients. Raises
    ValueError for what does not fit.
    """
    check("wkv6", ("r", "k", "v", "w"), r, k, v, w, initial_state, cu_seqlens, chunk_size, per_channel=True)
    if u.shape != r.shape[2:]:
        raise ValueError(f"wkv6: u must be (H, D) = {tuple(r.shape[2:])}, it is {tuple(u.shape)}")
    if bidirectional and (initial_state is not None or return_final_state):
        raise ValueError(
            "wkv6: a state goes one way only, and bidirectional=True reads in both; "
            "leave initial_state and return_final_state out, or use bidirectional=False"
        )
    options = {
        "bidirectional": bidirectional,
        "scale": scale,
        "initial_state": initial_state,
        "return_final_state": return_final_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
    }
    y, final_state = dispatch.choose("wkv6", form, r.device, r, k, v, w, u, **options).run(
        r, k, v, w, u, **options
    )
    return (y, final_state) if return_final_state else y


def _supported_by_fla(*args: Tensor, **options: Any) -> str | None:
    if options["bidirectional"]:
        return "it goes one way only"
    return supported_by_fla(*args, **options)


_FOLDER = "triptych.kernels.wkv6"
dispatch.register(
    "wkv6",
    external_packages.form("fla", "fla", f"{_FOLDER}.external", "wkv6", supports=_supported_by_fla),
)
dispatch.register("wkv6", triton_launch.form(f"{_FOLDER}.triton", "wkv6", supports=supported_by_triton))
dispatch.register("wkv6", dispatch.Form("torch", fast.wkv6))
dispatch.register("wkv6", dispatch.Form("reference", reference.wkv6))
dispatch.register_examples("wkv6", wkv6, examples.MAKERS)
