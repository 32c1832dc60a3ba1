"""Causal depthwise convolution, one token at a time. B batch, T length, C channels, K taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


def _one_document(
    x_TC: Tensor, weight: Tensor, bias: Tensor | None, history_CL: Tensor
) -> tuple[Tensor, Tensor]:
    """y (T, C) and the last K-1 inputs (C, K-1)."""
    window = list(history_CL.unbind(-1))
    outputs = []
    for token in x_TC.unbind(0):
        window.append(token)
        y = (torch.stack(window, -1) * weight).sum(-1)
        outputs.append(y if bias is None else y + bias)
        window.pop(0)
    return torch.stack(outputs), torch.stack(window, -1) if window else history_CL


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; autograd by PyTorch."""
    dtype = statistics_dtype(x, weight)
    batch, length, channels = x.shape
    flat = x.reshape(-1, channels).to(dtype)
    bounds = (
        [(i * length, (i + 1) * length) for i in range(batch)]
        if cu_seqlens is None
        else document_bounds(cu_seqlens)
    )
    ys, states = [], []
    for i, (start, end) in enumerate(bounds):
        history = flat.new_zeros(channels, weight.shape[1] - 1) if initial_state is None else initial_state[i]
        y, state = _one_document(
            flat[start:end], weight.to(dtype), None if bias is None else bias.to(dtype), history.to(dtype)
        )
        ys.append(F.silu(y) if activation == "silu" else y)
        states.append(state)
    final_state = torch.stack(states).to(x.dtype) if with_final_state else None
    return torch.cat(ys).view(x.shape).to(x.dtype), final_state
