"""RMS norm, gated and grouped. C channels, K groups of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.layer_norm.lines import too_long
from triptych.kernels.library import operator
from triptych.kernels.rms_norm import examples, reference
from triptych.kernels.rms_norm import torch as fast

_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")
"""Those of the external packages."""
_LONGEST = 65536
"""Bytes of the longest group that kernels of mamba-ssm and flash-linear-attention hold."""


@operator()
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, form: str | None = None) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight.

    x: (..., C). weight: (C,). Statistics are fp32 (fp64 for fp64 inputs); the result has x's dtype. Saved for
    backward: the inputs and one number per token. Raises ValueError for shapes that do not match.
    """
    _check("rms_norm", x, weight)
    return _run("rms_norm", form, x, weight, eps, None, 1, norm_before_gate=False)


@operator()
def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    form: str | None = None,
) -> Tensor:
    """The norm before Mamba-2's output projection (arXiv 2405.21060): rms_norm(x * silu(z)) * weight, or,
    with norm_before_gate, rms_norm(x) * weight * silu(z).

    x, z: (..., C). weight: (C,). group_size: channels that have one root mean square in common, None for all.
    Statistics are fp32 (fp64 for fp64 inputs); the result has x's dtype. Saved for backward: x, z, weight and
    one number per group and token. Raises ValueError for shapes that do not match.
    """
    channels = x.shape[-1]
    _check("gated_rms_norm", x, weight)
    if z.shape != x.shape:
        raise ValueError(f"gated_rms_norm: z {tuple(z.shape)} must have the shape of x {tuple(x.shape)}")
    size = channels if group_size is None else group_size
    if size < 1 or channels % size:
        raise ValueError(
            f"gated_rms_norm: group_size={group_size} does not divide the {channels} channels of x"
        )
    return _run("gated_rms_norm", form, x, weight, eps, z, channels // size, norm_before_gate)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight must be ({x.shape[-1]},) like x's last dim, it is {tuple(weight.shape)}"
        )


def _run(
    op: str,
    form: str | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    num_groups: int,
    norm_before_gate: bool,
) -> Tensor:
    arguments: dict[str, Any] = {
        "eps": eps,
        "gate": gate,
        "num_groups": num_groups,
        "norm_before_gate": norm_before_gate,
    }
    return dispatch.choose(op, form, x.device, x, weight, **arguments).run(x, weight, **arguments)


def _triton_supports(x: Tensor, weight: Tensor, *, num_groups: int, **_: Any) -> str | None:
    return too_long(x.shape[-1] // num_groups)


def _liger_supports(x: Tensor, weight: Tensor, **_: Any) -> str | None:
    if str(x.dtype) not in _DTYPES:
        return f"Liger has fp32, fp16 and bf16, not {x.dtype}"
    return too_long(x.shape[-1])


def _mamba_ssm_supports(x: Tensor, weight: Tensor, *, num_groups: int, **_: Any) -> str | None:
    if str(x.dtype) not in _DTYPES:
        return f"the package has fp32, fp16 and bf16, not {x.dtype}"
    size, limit = x.shape[-1] // num_groups, _LONGEST // x.element_size()
    if size > limit:
        return f"groups of {size} channels, more than the {limit} of the package's kernels"
    return "the package counts elements in 32 bits" if x.numel() >= 1 << 31 else None


def _fla_supports(
    x: Tensor, weight: Tensor, *, num_groups: int, norm_before_gate: bool, **_: Any
) -> str | None:
    if num_groups > 1 or not norm_before_gate:
        return "flash-linear-attention has one group, and norms before it gates"
    return _mamba_ssm_supports(x, weight, num_groups=1)


for _op in ("rms_norm", "gated_rms_norm"):
    dispatch.register(
        _op, triton_launch.form("triptych.kernels.rms_norm.triton", "rms_norm", supports=_triton_supports)
    )
_EXTERNAL = "triptych.kernels.rms_norm.external"
dispatch.register(
    "rms_norm",
    external_packages.form("liger", "liger_kernel", _EXTERNAL, "liger_rms_norm", supports=_liger_supports),
)
dispatch.register(
    "gated_rms_norm",
    external_packages.form(
        "mamba_ssm", "mamba_ssm", _EXTERNAL, "mamba_ssm_gated_rms_norm", supports=_mamba_ssm_supports
    ),
)
dispatch.register(
    "gated_rms_norm",
    external_packages.form("fla", "fla", _EXTERNAL, "fla_gated_rms_norm", supports=_fla_supports),
)
for _op in ("rms_norm", "gated_rms_norm"):
    dispatch.register(_op, dispatch.Form("torch", fast.rms_norm))
    dispatch.register(_op, dispatch.Form("reference", reference.rms_norm))
dispatch.register_examples("rms_norm", rms_norm, examples.MAKERS)
dispatch.register_examples("gated_rms_norm", gated_rms_norm, examples.GATED_MAKERS)
