"""Rotary positions in Triton: x is read once and written once, and sines and cosines never reach memory.

B batch, T length, H heads, D head dim, A axes, S = D/A channels of an axis. Pair j of a head belongs to axis
a = j // (S/2); its channels are j + a S/2 and S/2 further.

A program turns several heads of a block of tokens, whose angles they have in common. Angles are taken in
double precision up to the nearest whole turn: in single precision, those of position 131,072 are off by 0.004
radians.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels import triton_launch
from triptych.kernels.library import define, statistics_dtype
from triptych.kernels.rotary import torch as fast

_PAIRS = 1024
"""Pairs of channels per program and head: with 4 warps, 8 per thread, and in bf16 two loads of 16 bytes."""
_HEADS = 8
"""Most heads per program: a sine costs what moving several pairs does."""


@triton.jit
def kernel(
    x,
    positions,
    frequencies,
    out,
    tokens,
    length,
    heads,
    x_row,
    x_token,
    x_head,
    position_row,
    position_token,
    position_axis,
    HALF: tl.constexpr,
    AXES: tl.constexpr,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    head_blocks = tl.cdiv(heads, HEADS)
    program = tl.program_id(0).to(tl.int64)
    head_0 = program % head_blocks * HEADS
    token = program // head_blocks * TOKENS + tl.arange(0, TOKENS)
    row = token // length
    column = token % length
    pair = tl.arange(0, BLOCK)
    axis = pair // HALF
    inside = (token < tokens)[:, None] & (pair < AXES * HALF)[None, :]
    at = (row * position_row + column * position_token)[:, None] + (axis * position_axis)[None, :]
    position = tl.load(positions + at, mask=inside, other=0).to(tl.float64)
    frequency = tl.load(frequencies + pair, mask=pair < AXES * HALF, other=0.0)
    turns = position * frequency[None, :] * 0.15915494309189535
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(ACC)
    cos = tl.cos(angle)
    sin = tl.sin(angle)
    if INVERSE:
        sin = -sin

    first = (pair + axis * HALF)[None, :]
    source = x + (row * x_row + column * x_token)[:, None] + first
    target = out + (token * heads * (2 * AXES * HALF))[:, None] + first
    for i in tl.static_range(HEADS):
        head = head_0 + i
        mask = inside & (head < heads)
        u = tl.load(source + head * x_head, mask=mask, other=0.0).to(ACC)
        v = tl.load(source + head * x_head + HALF, mask=mask, other=0.0).to(ACC)
        to = target + head * (2 * AXES * HALF)
        tl.store(to, (u * cos - v * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(to + HALF, (v * cos + u * sin).to(out.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def _frequencies(theta: float, axes: int, half: int, device: torch.device) -> Tensor:
    """float64 (A, S/2): theta's. Kept, as every layer asks for the same."""
    exponents = torch.arange(half, dtype=torch.float64) * (-1.0 / half)
    return (theta**exponents).expand(axes, half).contiguous().to(device)


@define("rotary_triton")
def rotary_op(
    x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None, inverse: bool
) -> Tensor:
    """x (B, T, H, D) turned by the angles of positions (T, A) or (B, T, A); back again if `inverse`.
    frequencies: (A, D/2A), None for theta's."""
    batch, length, heads, dim = x.shape
    axes = positions.shape[-1]
    half = dim // axes // 2
    if x.stride(-1) != 1:
        x = x.contiguous()
    if frequencies is None:
        frequencies = _frequencies(theta, axes, half, x.device)
    positions = positions.expand(batch, length, axes)
    block = triton_launch.power_of_2(dim // 2)
    head_blocks = triton.cdiv(heads, _HEADS)
    tokens_at_once = max(1, _PAIRS // block)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    triton_launch.launch(
        kernel,
        (triton.cdiv(batch * length, tokens_at_once) * head_blocks,),
        x,
        positions,
        frequencies.to(torch.float64).contiguous(),
        out,
        batch * length,
        length,
        heads,
        *x.stride()[:3],
        *positions.stride(),
        HALF=half,
        AXES=axes,
        INVERSE=inverse,
        TOKENS=tokens_at_once,
        HEADS=triton.cdiv(heads, head_blocks),
        BLOCK=block,
        ACC=triton_launch.accumulator(statistics_dtype(x)),
    )
    return out


rotary_op.register_fake(fast.fake)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    positions, frequencies = ctx.saved_tensors
    return rotary_op(dy, positions, ctx.theta, frequencies, not ctx.inverse), None, None, None, None


rotary_op.register_autograd(_backward, setup_context=fast.setup)


def rotary(x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None) -> Tensor:
    """Shapes as in the op."""
    return rotary_op(x, positions, theta, frequencies, False)
