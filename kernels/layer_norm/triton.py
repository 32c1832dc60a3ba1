"""Layer norm in Triton, plain and under a modulation: one pass over memory each way."""

from typing import Any

from torch import Tensor

from triptych.kernels.layer_norm import torch as fast
from triptych.kernels.layer_norm import triton_kernels as norms
from triptych.kernels.layer_norm.lines import Lines, modulated_lines
from triptych.kernels.library import define, statistics_dtype


def _one_group(x: Tensor) -> Lines:
    return Lines(1, x.numel() // x.shape[-1], x.shape[-1])


def _row(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous().unsqueeze(0)


@define("layer_norm_triton")
def layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., C) of x's dtype, mean and rstd (...) in fp32 or fp64."""
    dtype = statistics_dtype(x, weight, bias)
    y, mean, rstd = norms.forward(
        x, None, _row(weight), _row(bias), _one_group(x), eps, dtype=dtype, centred=True
    )
    return y, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


layer_norm_op.register_fake(fast.fake_layer_norm)


@define("layer_norm_triton_backward")
def layer_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, the latter two in fp32 or fp64, and empty where there is no such parameter."""
    dx, _, dweight, dbias = norms.backward(
        dy, x, None, _row(weight), mean, rstd, _one_group(x), has_bias=has_bias, centred=True
    )
    dweight, dbias = (rstd.new_empty(0) if s is None else s.squeeze(0) for s in (dweight, dbias))
    return dx, dweight, dbias


layer_norm_backward_op.register_fake(fast.fake_layer_norm_backward)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return fast.gradients_of_layer_norm(ctx, dy, layer_norm_backward_op)


layer_norm_op.register_autograd(_backward, setup_context=fast.setup_layer_norm)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Shapes as in the public function."""
    return layer_norm_op(x, weight, bias, eps)[0]


def _modulated(x: Tensor, *modulations: Tensor) -> tuple[Lines, list[Tensor]]:
    """Lines of x, and modulations (..., C) as rows (groups or lines, C) with neighbouring channels."""
    lines = modulated_lines(x.shape, modulations[0].shape)
    assert lines is not None, "the form's `supports` has seen to it"
    # Parts of one linear's output stay views of it.
    rows = [m.reshape(-1, x.shape[-1]) for m in modulations]
    return lines, [m if m.stride(-1) == 1 else m.contiguous() for m in rows]


@define("modulated_layer_norm_triton")
def modulated_layer_norm_op(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, C) of x's dtype, mean and rstd (B, T, 1) in fp32 or fp64."""
    lines, (shifts, scales) = _modulated(x, shift, scale)
    dtype = statistics_dtype(x, shift, scale)
    y, mean, rstd = norms.forward(x, None, scales, shifts, lines, eps, dtype=dtype, centred=True, offset=1)
    return y, mean.view(*x.shape[:-1], 1), rstd.view(*x.shape[:-1], 1)


modulated_layer_norm_op.register_fake(fast.fake)


@define("modulated_layer_norm_triton_backward")
def modulated_layer_norm_backward_op(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dshift and dscale."""
    lines, (scales,) = _modulated(x, scale)
    dx, _, dscale, dshift = norms.backward(
        dy, x, None, scales, mean, rstd, lines, has_bias=True, centred=True, offset=1
    )
    assert dscale is not None and dshift is not None, "there are both"
    dshift, dscale = (d.view(scale.shape).to(scale.dtype) for d in (dshift, dscale))
    return dx, dshift, dscale


modulated_layer_norm_backward_op.register_fake(fast.fake_backward)


def _backward_of_modulated(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None
    return *modulated_layer_norm_backward_op(dy, *ctx.saved_tensors), None


modulated_layer_norm_op.register_autograd(_backward_of_modulated, setup_context=fast.setup)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Shapes as in the public function."""
    return modulated_layer_norm_op(x, shift, scale, eps)[0]
