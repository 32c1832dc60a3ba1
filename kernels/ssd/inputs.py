"""What is done to step sizes and to b and c before the scan.

B batch, T length, H heads, G groups, N state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype

NO_LIMIT = (0.0, math.inf)


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """clamp(softplus(dt + dt_bias)) (B, T, H) in `dtype`; dt itself where nothing is asked for."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt if tuple(dt_limit) == NO_LIMIT else dt.clamp(*dt_limit)


@define("ssd_rotate")
def rotate_op(values: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    """Pairs (i, i + N/2) of values (B, T, G, N) turned by angles (B, T, G, N/2), backwards if `inverse`."""
    dtype = statistics_dtype(values, angles)
    angles = angles.to(dtype)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin.neg_()
    first, second = (half.to(dtype) for half in values.chunk(2, dim=-1))
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    half = out.shape[-1] // 2
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half:] = (second * cos).addcmul_(first, sin)
    return out


@rotate_op.register_fake
def _(values: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    return values.new_empty(values.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, angles, ctx.inverse = inputs
    ctx.save_for_backward(values, angles)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    values, angles = ctx.saved_tensors
    dvalues = rotate_op(dy, angles, not ctx.inverse)
    # A rotation keeps the cross product: of the outputs with dy, as of the inputs with dvalues.
    dtype = statistics_dtype(values, angles)
    (first, second), (dfirst, dsecond) = (v.to(dtype).chunk(2, dim=-1) for v in (values, dvalues))
    dangles = first * dsecond - second * dfirst
    return dvalues, (-dangles if ctx.inverse else dangles).to(angles.dtype), None


rotate_op.register_autograd(_backward, setup_context=_setup)


def rotate(values: Tensor, angles: Tensor | None) -> Tensor:
    """Rotary positions of b or c, where there are angles; in fp32 (fp64), of values' shape and dtype."""
    return values if angles is None else rotate_op(values, angles, False)
