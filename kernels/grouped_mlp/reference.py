"""The feed-forward of each expert, one after the other. A rows, E experts, C channels, F inner ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Shapes as in the public function; autograd by PyTorch."""
    parts = []
    for e, rows in enumerate(x.split(counts.tolist())):
        inner = F.linear(rows, up[e], None if up_bias is None else up_bias[e])
        if gate is None:
            inner = F.gelu(inner, approximate="tanh")
        else:
            inner = F.silu(F.linear(rows, gate[e], None if gate_bias is None else gate_bias[e])) * inner
        parts.append(F.linear(inner, down[e], None if down_bias is None else down_bias[e]))
    return torch.cat(parts)
