"""GEGLU's activation as one operator that saves its two inputs and nothing else."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype


@define("geglu")
def geglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, of the inputs' common dtype."""
    wide = gate.contiguous().to(statistics_dtype(gate, up))
    return F.gelu(wide, approximate="tanh").mul_(up).to(torch.promote_types(gate.dtype, up.dtype))


@geglu_op.register_fake
def fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@define("geglu_backward")
def geglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup, each of its input's dtype."""
    dtype = statistics_dtype(gate, up)
    wide, dy = gate.contiguous().to(dtype), dy.contiguous().to(dtype)
    dgate = torch.ops.aten.gelu_backward(dy * up, wide, approximate="tanh")
    return dgate.to(gate.dtype), F.gelu(wide, approximate="tanh").mul_(dy).to(up.dtype)


@geglu_backward_op.register_fake
def fake_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """Keeps the inputs."""
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return geglu_backward_op(dy, *ctx.saved_tensors)


geglu_op.register_autograd(_backward, setup_context=setup)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return geglu_op(gate, up)
