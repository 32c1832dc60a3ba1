"""GEGLU's activation in Triton: one pass over memory each way, in rows of BLOCK elements whatever the shape.

With v = 2 sqrt(2/pi) (x + 0.044715 x^3) and s = sigmoid(v), gelu(x) = x s in its tanh form, since
(1 + tanh(v/2)) / 2 = s; and gelu'(x) = s + x s (1 - s) v'.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.geglu import torch as fast
from triptych.kernels.library import define
from triptych.kernels.triton_launch import accumulator, launch

BLOCK = 2048
"""Elements of a program: with 8 warps 8 per thread, in bf16 one load of 16 bytes of each input."""


@triton.jit
def forward_kernel(gate, up, out, numel, ACC: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    x = tl.load(gate + at, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + at, mask=inside, other=0.0).to(ACC)
    v = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    tl.store(out + at, (x / (1.0 + tl.exp(-v)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(dy, gate, up, dgate, dup, numel, ACC: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    d = tl.load(dy + at, mask=inside, other=0.0).to(ACC)
    x = tl.load(gate + at, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + at, mask=inside, other=0.0).to(ACC)
    v = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    s = 1.0 / (1.0 + tl.exp(-v))
    tl.store(dgate + at, (d * u * (s + x * s * (1.0 - s) * slope)).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (d * x * s).to(dup.dtype.element_ty), mask=inside)


@define("geglu_triton")
def geglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, of the inputs' common dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    options = {"ACC": accumulator(out.dtype), "BLOCK": BLOCK}
    launch(forward_kernel, grid, gate, up, out, out.numel(), **options, num_warps=8)
    return out


geglu_op.register_fake(fast.fake)


@define("geglu_triton_backward")
def geglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup, each of its input's dtype."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(dy.numel(), BLOCK),)
    options = {"ACC": accumulator(dy.dtype), "BLOCK": BLOCK}
    launch(backward_kernel, grid, dy, gate, up, dgate, dup, dy.numel(), **options, num_warps=8)
    return dgate, dup


geglu_backward_op.register_fake(fast.fake_backward)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return geglu_backward_op(dy, *ctx.saved_tensors)


geglu_op.register_autograd(_backward, setup_context=fast.setup)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return geglu_op(gate, up)
