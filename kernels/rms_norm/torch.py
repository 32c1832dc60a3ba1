"""RMS norm that keeps its inputs and one number per group and token. C channels, K groups."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, statistics_dtype


def _gated(x: Tensor, gate: Tensor | None, num_groups: int, dtype: torch.dtype) -> Tensor:
    """x * silu(gate) in the statistics' dtype, (..., K, C/K)."""
    v = x.contiguous().to(dtype)
    if gate is not None:
        v = F.silu(gate.contiguous().to(dtype)).mul_(v)
    return v.unflatten(-1, (num_groups, -1))


@define("rms_norm")
def rms_norm_op(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, num_groups: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    """y (..., C) of x's dtype and rstd (..., K) in fp32 or fp64."""
    dtype = statistics_dtype(x, weight)
    v = _gated(x, None if norm_before_gate else gate, num_groups, dtype)
    rstd = torch.linalg.vector_norm(v, dim=-1).square_().div_(v.shape[-1]).add_(eps).rsqrt_()
    y = (v * rstd.unsqueeze(-1)).flatten(-2).mul_(weight)
    if gate is not None and norm_before_gate:
        y.mul_(F.silu(gate.to(dtype)))
    return y.to(x.dtype), rstd


@rms_norm_op.register_fake
def fake(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, num_groups: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty((*x.shape[:-1], num_groups), dtype=statistics_dtype(x, weight))
    return x.new_empty(x.shape), rstd


@define("rms_norm_backward")
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
    dtype = rstd.dtype
    normed = _gated(x, None if norm_before_gate else gate, num_groups, dtype) * rstd.unsqueeze(-1)
    dy = dy.to(dtype)
    dgate = dy.new_empty(0)
    if gate is not None and norm_before_gate:
        gate_ = gate.contiguous().to(dtype)
        dgate = torch.ops.aten.silu_backward(normed.flatten(-2) * weight * dy, gate_).to(gate.dtype)
        dy = F.silu(gate_).mul_(dy)
    dweight = (dy * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight.dtype)
    dnormed = (dy * weight).unflatten(-1, (num_groups, -1))
    mean = (dnormed * normed).mean(-1, keepdim=True)
    dv = dnormed.sub_(normed.mul_(mean)).mul_(rstd.unsqueeze(-1)).flatten(-2)
    if gate is None or norm_before_gate:
        return dv.to(x.dtype, copy=True), dweight, dgate
    gate_ = gate.contiguous().to(dtype)
    dgate = torch.ops.aten.silu_backward(dv * x, gate_)
    return dv.mul_(F.silu(gate_)).to(x.dtype), dweight, dgate.to(gate.dtype)


@rms_norm_backward_op.register_fake
def fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rstd: Tensor,
    num_groups: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dgate = rstd.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dgate


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the inputs and rstd."""
    x, weight, gate, _, ctx.num_groups, ctx.norm_before_gate = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gate, output[1])


def gradients(ctx: Any, dy: Tensor | None, backward_op: Any) -> tuple[Any, ...]:
    """Those of the op's arguments, by `backward_op`."""
    if dy is None:
        return (None,) * 6
    x, weight, gate, rstd = ctx.saved_tensors
    dx, dweight, dgate = backward_op(dy, x, weight, gate, rstd, ctx.num_groups, ctx.norm_before_gate)
    return dx, dweight, None if gate is None else dgate, None, None, None


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    return gradients(ctx, dy, rms_norm_backward_op)


rms_norm_op.register_autograd(_backward, setup_context=setup)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None, num_groups: int, norm_before_gate: bool
) -> Tensor:
    """Shapes as in the public functions."""
    return rms_norm_op(x, weight, gate, eps, num_groups, norm_before_gate)[0]
