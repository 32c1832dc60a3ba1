"""RMS norm in Triton: one pass over memory each way, weights' gradients by partial sums.

The kernels are those of all norms, `triptych.kernels.layer_norm.triton_kernels`; a line is a group of
channels of one token.
"""

from typing import Any

from torch import Tensor

from triptych.kernels.layer_norm import triton_kernels as norms
from triptych.kernels.layer_norm.lines import Lines
from triptych.kernels.library import define, statistics_dtype
from triptych.kernels.rms_norm import torch as fast


def _lines(x: Tensor, num_groups: int) -> Lines:
    channels = x.shape[-1]
    return Lines(num_groups, x.numel() // channels, channels // num_groups, interleaved=True)


def _gate(gate: Tensor | None, norm_before_gate: bool) -> int:
    if gate is None:
        return norms.NO_GATE
    return norms.NORM_FIRST if norm_before_gate else norms.GATE_FIRST


@define("rms_norm_triton")
def rms_norm_op(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, num_groups: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    """y (..., C) of x's dtype and rstd (..., K) in fp32 or fp64."""
    y, _, rstd = norms.forward(
        x,
        gate,
        weight.contiguous().view(num_groups, -1),
        None,
        _lines(x, num_groups),
        eps,
        dtype=statistics_dtype(x, weight),
        centred=False,
        gate=_gate(gate, norm_before_gate),
    )
    return y, rstd.view(*x.shape[:-1], num_groups)


rms_norm_op.register_fake(fast.fake)


@define("rms_norm_triton_backward")
def rms_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rstd: Tensor,
    num_groups: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dgate (empty where there is no gate)."""
    dx, dgate, dweight, _ = norms.backward(
        dy,
        x,
        gate,
        weight.contiguous().view(num_groups, -1),
        rstd,
        rstd,
        _lines(x, num_groups),
        centred=False,
        gate=_gate(gate, norm_before_gate),
    )
    assert dweight is not None, "there is a weight"
    return dx, dweight.view(-1).to(weight.dtype), rstd.new_empty(0) if dgate is None else dgate


rms_norm_backward_op.register_fake(fast.fake_backward)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    return fast.gradients(ctx, dy, rms_norm_backward_op)


rms_norm_op.register_autograd(_backward, setup_context=fast.setup)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None, num_groups: int, norm_before_gate: bool
) -> Tensor:
    """Shapes as in the public functions."""
    return rms_norm_op(x, weight, gate, eps, num_groups, norm_before_gate)[0]
