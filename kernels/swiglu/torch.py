"""SwiGLU's activation as one operator that saves its two inputs and nothing else."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype


@define("swiglu")
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the inputs' common dtype."""
    dtype = statistics_dtype(gate, up)
    return F.silu(gate.contiguous().to(dtype)).mul_(up).to(torch.promote_types(gate.dtype, up.dtype))


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@define("swiglu_backward")
def swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup, each of its input's dtype."""
    dtype = statistics_dtype(gate, up)
    wide, dy = gate.contiguous().to(dtype), dy.contiguous().to(dtype)
    dgate = torch.ops.aten.silu_backward(dy * up, wide)
    return dgate.to(gate.dtype), F.silu(wide).mul_(dy).to(up.dtype)


@swiglu_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(dy, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return swiglu_op(gate, up)
