"""Layer norm, and layer norm under a modulation. B batch, T length, C channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.layer_norm import examples, reference
from triptych.kernels.layer_norm import torch as fast
from triptych.kernels.layer_norm.lines import modulated_lines, too_long
from triptych.kernels.library import operator

_LIGER_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")


@operator()
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    form: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv 1607.06450) over the last dim.

    x: (..., C). weight, bias: (C,) or None. Statistics are fp32 inside; the result has x's dtype, under
    autocast too, so that no fp32 copy of a bf16 stream is kept. Saved for backward: x, weight and two numbers
    per token. Raises ValueError for shapes that do not match.
    """
    channels = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(
                f"layer_norm: {name} must be ({channels},) like x's last dim, it is {tuple(parameter.shape)}"
            )
    arguments = (x, weight, bias, eps)
    return dispatch.choose("layer_norm", form, x.device, *arguments).run(*arguments)


@operator()
def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, form: str | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (1 + scale) + shift over the last dim (adaLN, arXiv 2212.09748).

    x: (B, T, C). shift, scale: of one shape and dtype, each dim of it 1 or x's, and C the last: (B, 1, C) for
    one modulation per row, (B, T, C) for one per token. Computed in fp32 (fp64 for fp64 inputs); the result
    has x's dtype. Saved for backward: x, scale and two numbers per token; the normed x is computed again.
    Raises ValueError for shapes that do not match.
    """
    if (shift.shape, shift.dtype) != (scale.shape, scale.dtype):
        raise ValueError(
            f"modulated_layer_norm: shift {tuple(shift.shape)} {shift.dtype} and scale {tuple(scale.shape)} "
            f"{scale.dtype} must have one shape and dtype"
        )
    fits = shift.dim() == x.dim() and all(m in (1, n) for m, n in zip(shift.shape, x.shape))
    if not fits or shift.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"modulated_layer_norm: shift and scale {tuple(shift.shape)} must have x's dims "
            f"{tuple(x.shape)}, or 1 in place of those before the last"
        )
    arguments = (x, shift, scale, eps)
    return dispatch.choose("modulated_layer_norm", form, x.device, *arguments).run(*arguments)


def _fits(x: Tensor, *_: Any) -> str | None:
    return too_long(x.shape[-1])


def _fits_modulated(x: Tensor, shift: Tensor, *_: Any) -> str | None:
    if modulated_lines(x.shape, shift.shape) is None:
        return f"a modulation {tuple(shift.shape)} of x {tuple(x.shape)} is neither per row nor per token"
    return _fits(x)


def _liger_supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    if weight is None or bias is None:
        return "Liger's layer norm wants a weight and a bias"
    if str(x.dtype) not in _LIGER_DTYPES:
        return f"Liger has fp32, fp16 and bf16, not {x.dtype}"
    return _fits(x)


dispatch.register(
    "layer_norm", triton_launch.form("triptych.kernels.layer_norm.triton", "layer_norm", supports=_fits)
)
dispatch.register(
    "layer_norm",
    external_packages.form(
        "liger",
        "liger_kernel",
        "triptych.kernels.layer_norm.external",
        "layer_norm",
        supports=_liger_supports,
    ),
)
dispatch.register("layer_norm", dispatch.Form("torch", fast.layer_norm))
dispatch.register("layer_norm", dispatch.Form("reference", reference.layer_norm))
dispatch.register_examples("layer_norm", layer_norm, examples.MAKERS)
dispatch.register(
    "modulated_layer_norm",
    triton_launch.form(
        "triptych.kernels.layer_norm.triton", "modulated_layer_norm", supports=_fits_modulated
    ),
)
dispatch.register("modulated_layer_norm", dispatch.Form("torch", fast.modulated_layer_norm))
dispatch.register("modulated_layer_norm", dispatch.Form("reference", reference.modulated_layer_norm))
dispatch.register_examples("modulated_layer_norm", modulated_layer_norm, examples.MODULATED_MAKERS)
