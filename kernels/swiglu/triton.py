"""SwiGLU's activation in Triton: one pass over memory each way, BLOCK elements per program."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.library import define
from triptych.kernels.triton_launch import accumulator, launch

BLOCK = 2048
"""Elements of a program: with 8 warps 8 per thread, in bf16 one load of 16 bytes of each input."""


@triton.jit
def forward_kernel(gate, up, out, numel, ACC: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(gate + at, mask=inside).to(ACC)
    u = tl.load(up + at, mask=inside).to(ACC)
    tl.store(out + at, g / (1 + tl.exp(-g)) * u, mask=inside)


@triton.jit
def backward_kernel(dy, gate, up, dgate, dup, numel, ACC: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    d = tl.load(dy + at, mask=inside).to(ACC)
    g = tl.load(gate + at, mask=inside).to(ACC)
    u = tl.load(up + at, mask=inside).to(ACC)
    sigmoid = 1 / (1 + tl.exp(-g))
    tl.store(dgate + at, d * u * sigmoid * (1 + g * (1 - sigmoid)), mask=inside)
    tl.store(dup + at, d * g * sigmoid, mask=inside)


@define("swiglu_triton")
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the inputs' common dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    launch(
        forward_kernel, grid, gate, up, out, out.numel(), ACC=accumulator(out.dtype), BLOCK=BLOCK, num_warps=8
    )
    return out


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@define("swiglu_triton_backward")
def swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup, each of its input's dtype."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(dy.numel(), BLOCK),)
    tensors, options = (dy, gate, up, dgate, dup), {"ACC": accumulator(dy.dtype), "BLOCK": BLOCK}
    launch(backward_kernel, grid, *tensors, dy.numel(), **options, num_warps=8)
    return dgate, dup


@swiglu_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(dy, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return swiglu_op(gate, up)
