"""Rotary positions as one operator that saves the positions only: its gradient is the rotation back.

B batch, T length, H heads, D head dim, A axes, S = D/A channels of an axis.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype


@define("rotary")
def rotary_op(
    x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None, inverse: bool
) -> Tensor:
    """x (B, T, H, D) turned by the angles of positions (T, A) or (B, T, A); back again if `inverse`.
    frequencies: (A, S/2), None for theta's."""
    dtype = statistics_dtype(x)
    axes = positions.shape[-1]
    half = x.shape[-1] // axes // 2
    if frequencies is None:
        exponents = torch.arange(half, device=x.device, dtype=dtype).mul_(-1.0 / half)
        frequencies = torch.pow(torch.tensor(theta, device=x.device, dtype=dtype), exponents)
    frequencies = frequencies.to(dtype)
    angles = (positions.to(dtype).unsqueeze(-1) * frequencies)[
        ..., None, :, None, :
    ]  # (T or B T, 1, A, 1, S/2)
    cos, sin = angles.cos(), angles.sin().squeeze(-2)
    if inverse:
        sin.neg_()
    x_wide = x.to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.mul(x_wide, cos.expand(*cos.shape[:-2], 2, half).flatten(-3), out=out)
    first, second = x_wide.unflatten(-1, (axes, 2, half)).unbind(-2)  # (B, T, H, A, S/2)
    to_first, to_second = out.view(*x.shape[:-1], axes, 2, half).unbind(-2)
    to_first.addcmul_(second, sin, value=-1)
    to_second.addcmul_(first, sin)
    return out.to(x.dtype)


@rotary_op.register_fake
def fake(x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the positions, and the frequencies if given."""
    _, positions, ctx.theta, frequencies, ctx.inverse = inputs
    ctx.save_for_backward(positions, frequencies)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    positions, frequencies = ctx.saved_tensors
    return rotary_op(dy, positions, ctx.theta, frequencies, not ctx.inverse), None, None, None, None


rotary_op.register_autograd(_backward, setup_context=setup)


def rotary(x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None) -> Tensor:
    """Shapes as in the op."""
    return rotary_op(x, positions, theta, frequencies, False)
