"""State-space dual scan (Mamba-2).

B batch, T length, H heads, P head dim, G groups, N state, docs packed documents.
"""

from __future__ import annotations

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.library import operator, statistics_dtype
from triptych.kernels.segments import check_cu_seqlens
from triptych.kernels.ssd import examples, reference
from triptych.kernels.ssd import torch as fast
from triptych.kernels.ssd.inputs import NO_LIMIT, rotate, step_sizes
from triptych.kernels.ssd.limits import mamba_ssm_lacks, triton_lacks


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    angles: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor: ...


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    angles: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@operator()
def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    angles: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    form: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-2 (arXiv 2405.21060, section 6), h[t] = exp(dt[t] a) h[t-1] + dt[t] x[t] b[t]^T,
    y[t] = (h[t] c[t] + d x[t]) * silu(z[t]), in chunks.

    x: (B, T, H, P), any float dtype. dt: (B, T, H), >= 0 once dt_bias (H,) is added, dt_softplus has taken
    softplus of it and dt_limit has clamped it. a: (H,), < 0. b, c: (B, T, G, N); head h uses group
    h // (H/G). angles: (B, T, G, N/2), radians by which the pairs (i, i + N/2) of b and c are turned first.
    d: (H,). z: like x. initial_state: (B or docs, H, P, N), None means zeros. cu_seqlens: packed documents,
    see `triptych.kernels.segments`; each begins with its own state. chunk_size: tokens worked on by one
    matmul (by Triton at most 64); the result depends on it by rounding only.
    Returns y, shaped and typed like x, and with return_final_state the state after the last token of each row
    or document, in fp32 (fp64 where x, dt or a is). Every input and both outputs carry gradients. Step sizes,
    angles and decays are computed in fp32 (fp64) whatever x is. Raises ValueError for what does not fit.
    """
    _check(x, dt, a, b, c, d, initial_state, cu_seqlens, chunk_size)
    _check_options(x, b, z, dt_bias, dt_limit, angles)
    arguments = (x, dt, a, b, c)
    options = {
        "d": d,
        "z": z,
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
        "dt_limit": (float(dt_limit[0]), float(dt_limit[1])),
        "angles": angles,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "with_final_state": return_final_state,
    }
    chosen = dispatch.choose("ssd", form, x.device, *arguments, **options)
    y, final_state = chosen.run(*arguments, **options)
    return (y, final_state) if return_final_state else y


@operator()
def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    angles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for generation.

    state: (B, H, P, N). x, z: (B, H, P). dt: (B, H). a, d, dt_bias: (H,). b, c: (B, G, N).
    angles: (B, G, N/2). Returns y (B, H, P) of x's dtype and the new state in fp32 (fp64); `state` itself is
    left as it is. Raises ValueError for what does not fit.
    """
    if state.shape[:3] != x.shape or dt.shape != x.shape[:2] or b.shape != c.shape or x.shape[1] % b.shape[1]:
        raise ValueError(
            "ssd_step: state must be (B, H, P, N), x (B, H, P), dt (B, H), b and c (B, G, N), G dividing H;"
            f" they are {', '.join(str(tuple(y.shape)) for y in (state, x, dt, b, c))}"
        )
    _check_options(x, b, z, dt_bias, dt_limit, angles, name="ssd_step")
    dtype = statistics_dtype(x, dt, a)
    b, c = (rotate(y.to(dtype), angles) for y in (b, c))
    b, c = (y.repeat_interleave(x.shape[1] // y.shape[1], dim=1).unsqueeze(2) for y in (b, c))
    dt, wide = step_sizes(dt, dt_bias, dt_softplus, dt_limit, dtype), x.to(dtype)
    decay = (dt * a.to(dtype)).exp()[..., None, None]
    state = decay * state.to(dtype) + (dt.unsqueeze(-1) * wide).unsqueeze(-1) * b
    y = (state * c).sum(-1)
    if d is not None:
        y = y + d.to(dtype).unsqueeze(-1) * wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


def _check(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"ssd: x must be (B, T, H, P), it is {tuple(x.shape)}")
    batch, length, heads, head_dim = x.shape
    if length == 0:
        raise ValueError(f"ssd: x {tuple(x.shape)} has no tokens; T must be at least 1")
    if dt.shape != x.shape[:3]:
        raise ValueError(f"ssd: dt must be (B, T, H) = {tuple(x.shape[:3])}, it is {tuple(dt.shape)}")
    if b.dim() != 4 or b.shape != c.shape or b.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"ssd: b and c must be (B, T, G, N) with (B, T) = {(batch, length)}; "
            f"they are {tuple(b.shape)} and {tuple(c.shape)}"
        )
    if heads % b.shape[2]:
        raise ValueError(
            f"ssd: {b.shape[2]} groups do not divide {heads} heads; choose a divisor of the latter"
        )
    for name, value in (("a", a), ("d", d)):
        if value is not None and value.shape != (heads,):
            raise ValueError(f"ssd: {name} must be (H,) = ({heads},), it is {tuple(value.shape)}")
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size={chunk_size} must be at least 1; 64 is usual")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    expected = (count, heads, head_dim, b.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"ssd: initial_state must be {expected}, it is {tuple(initial_state.shape)}")


def _check_options(
    x: Tensor,
    b: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    angles: Tensor | None,
    name: str = "ssd",
) -> None:
    if z is not None and z.shape != x.shape:
        raise ValueError(f"{name}: z must be shaped like x {tuple(x.shape)}, it is {tuple(z.shape)}")
    if dt_bias is not None and dt_bias.shape != x.shape[-2:-1]:
        raise ValueError(f"{name}: dt_bias must be (H,) = ({x.shape[-2]},), it is {tuple(dt_bias.shape)}")
    low, high = dt_limit
    if not 0 <= low < high:
        raise ValueError(f"{name}: dt_limit={tuple(dt_limit)} is no range; use 0 <= low < high")
    if angles is not None and (2 * angles.shape[-1] != b.shape[-1] or angles.shape[:-1] != b.shape[:-1]):
        raise ValueError(
            f"{name}: angles must be half as wide as b {tuple(b.shape)}, N even; "
            f"they are {tuple(angles.shape)}"
        )


dispatch.register(
    "ssd",
    external_packages.form(
        "mamba_ssm", "mamba_ssm", "triptych.kernels.ssd.external", "ssd", supports=mamba_ssm_lacks
    ),
)
dispatch.register("ssd", triton_launch.form("triptych.kernels.ssd.triton", "ssd", supports=triton_lacks))
dispatch.register("ssd", dispatch.Form("torch", fast.ssd))
dispatch.register("ssd", dispatch.Form("reference", reference.ssd))
dispatch.register_examples("ssd", ssd, examples.MAKERS)
