"""Rotary positions as one operator that saves the positions only: its gradient is the rotation back.

B batch, T length, H heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype


@define("rotary")
def rotary_op(
    x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None, inverse: bool
) -> Tensor:
    """x (B, T, H, D) turned by the angles of positions (T,) or (B, T); back again if `inverse`."""
    dtype = statistics_dtype(x)
    half = x.shape[-1] // 2
    if frequencies is None:
        exponents = torch.arange(half, device=x.device, dtype=dtype).mul_(-2.0 / x.shape[-1])
        frequencies = torch.pow(torch.tensor(theta, device=x.device, dtype=dtype), exponents)
    frequencies = frequencies.to(dtype)
    angles = (positions.to(dtype).unsqueeze(-1) * frequencies).unsqueeze(-2)  # (T or B T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin.neg_()
    first, second = x[..., :half].to(dtype), x[..., half:].to(dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half:] = (second * cos).addcmul_(first, sin)
    return out


@rotary_op.register_fake
def _(x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, ctx.theta, frequencies, ctx.inverse = inputs
    ctx.save_for_backward(positions, frequencies)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    positions, frequencies = ctx.saved_tensors
    return rotary_op(dy, positions, ctx.theta, frequencies, not ctx.inverse), None, None, None, None


rotary_op.register_autograd(_backward, setup_context=_setup)


def rotary(x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None = None) -> Tensor:
    """Shapes as in the public function."""
    return rotary_op(x, positions, float(theta), frequencies, False)
