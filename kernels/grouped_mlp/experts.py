"""Forward and backward of experts' feed-forwards, expert by expert or all at once.

A rows sorted by expert, E experts, C channels, F inner channels. counts: int64 (E,).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.grouped_linear.products import (
    add_bias,
    backward_rows,
    bias_gradient,
    forward_rows,
    row_bounds,
    weight_gradient,
)
from triptych.kernels.library import statistics_dtype

Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # of x, up, down, gate, up_bias, gate_bias, down_bias


def activate(up: Tensor, gate: Tensor | None) -> Tensor:
    """silu(gate) * up, or gelu(up), computed in fp32 at least, in up's dtype; up (A, F)."""
    wide = statistics_dtype(up)
    if gate is None:
        return F.gelu(up.to(wide), approximate="tanh").to(up.dtype)
    return F.silu(gate.to(wide)).mul_(up).to(up.dtype)


def activate_backward(dh: Tensor, up: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activation once more, and the gradients of up and gate; dh may be overwritten."""
    wide = statistics_dtype(up)
    dtype, up, dh = up.dtype, up.to(wide), dh.to(wide)
    if gate is None:
        h = F.gelu(up, approximate="tanh")
        return h.to(dtype), torch.ops.aten.gelu_backward(dh, up, approximate="tanh").to(dtype), None
    gate = gate.to(wide)
    silu = F.silu(gate)
    h = silu * up
    dup = silu.mul_(dh)
    dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
    return h.to(dtype), dup.to(dtype), dgate.to(dtype)


def forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (A, C), and before the activation up (A, F) and gate (A, F), the latter empty where there is none."""
    if x.is_cuda:
        return _forward_at_once(x, up, down, counts, gate, up_bias, gate_bias, down_bias)
    y = x.new_empty(x.shape[0], down.shape[1])
    inner_up = x.new_empty(x.shape[0], up.shape[1])
    inner_gate = x.new_empty(0) if gate is None else torch.empty_like(inner_up)
    for e, (start, end) in enumerate(row_bounds(counts, x.shape[0])):
        if start == end:
            continue
        rows = x[start:end]
        up_e = _linear(rows, up[e], up_bias, e, inner_up[start:end])
        gate_e = None if gate is None else _linear(rows, gate[e], gate_bias, e, inner_gate[start:end])
        _linear(activate(up_e, gate_e), down[e], down_bias, e, y[start:end])
    return y, inner_up, inner_gate


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias[expert], x, weight.T, out=out)


def backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    inner_up: Tensor,
    inner_gate: Tensor,
    with_bias: Sequence[bool],
) -> Gradients:
    """Gradients of all inputs. with_bias: which of up_bias, gate_bias and down_bias there are."""
    if x.is_cuda:
        return _backward_at_once(dy, x, up, down, counts, gate, inner_up, inner_gate, with_bias)
    dx, dup, ddown = (y.new_empty(y.shape) for y in (x, up, down))
    dgate = None if gate is None else gate.new_empty(gate.shape)
    dbiases = [
        weight.new_zeros(weight.shape[:2]) if wanted else None
        for weight, wanted in zip((up, up, down), with_bias, strict=True)
    ]
    for e, (start, end) in enumerate(row_bounds(counts, x.shape[0])):
        if start == end:
            for gradient in (dup, ddown, dgate):
                if gradient is not None:
                    gradient[e] = 0
            continue
        rows, dy_e, dx_e = x[start:end], dy[start:end], dx[start:end]
        gate_e = None if gate is None else inner_gate[start:end]
        h, dup_e, dgate_e = activate_backward(dy_e @ down[e], inner_up[start:end], gate_e)
        torch.mm(dy_e.T, h, out=ddown[e])
        torch.mm(dup_e.T, rows, out=dup[e])
        torch.mm(dup_e, up[e], out=dx_e)
        if gate is not None and dgate is not None and dgate_e is not None:
            torch.mm(dgate_e.T, rows, out=dgate[e])
            dx_e.addmm_(dgate_e, gate[e])
        for dbias, rows_e in zip(dbiases, (dup_e, dgate_e, dy_e), strict=True):
            if dbias is not None and rows_e is not None:
                dbias[e] = rows_e.sum(0, dtype=statistics_dtype(rows_e))
    return dx, dup, ddown, dgate, dbiases[0], dbiases[1], dbiases[2]


def _forward_at_once(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = forward_rows(rows, weight.contiguous(), counts)
        return y if bias is None else add_bias(y, bias, counts)

    inner_up = linear(x, up, up_bias)
    inner_gate = None if gate is None else linear(x, gate, gate_bias)
    y = linear(activate(inner_up, inner_gate), down, down_bias)
    return y, inner_up, x.new_empty(0) if inner_gate is None else inner_gate


def _backward_at_once(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    inner_up: Tensor,
    inner_gate: Tensor,
    with_bias: Sequence[bool],
) -> Gradients:
    dy, x = dy.contiguous(), x.contiguous()
    h, dinner_up, dinner_gate = activate_backward(
        backward_rows(dy, down.contiguous(), counts), inner_up, None if gate is None else inner_gate
    )
    ddown = weight_gradient(dy, h, counts)
    del h
    dx = backward_rows(dinner_up, up.contiguous(), counts)
    dup, dgate = weight_gradient(dinner_up, x, counts), None
    if gate is not None and dinner_gate is not None:
        dx.add_(backward_rows(dinner_gate, gate.contiguous(), counts))
        dgate = weight_gradient(dinner_gate, x, counts)
    dbiases = [
        bias_gradient(rows, counts) if wanted and rows is not None else None
        for rows, wanted in zip((dinner_up, dinner_gate, dy), with_bias, strict=True)
    ]
    return dx, dup, ddown, dgate, dbiases[0], dbiases[1], dbiases[2]
