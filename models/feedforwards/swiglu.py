"""Gated feed-forward (arXiv 2002.05202).

Shape legend: B batch, T length, C hidden size, F intermediate size.
"""

from __future__ import annotations

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.init import ZEROS, Init
from triptych.models.linear import Linear
from triptych.models.registry import register_ffn
from triptych.models.sharding import COLUMN, ROW, ROW_BIAS, Cut

MULTIPLE = 64
"""The default intermediate size is a multiple of this, for the sake of matmul tiles."""


def default_intermediate_size(hidden_size: int) -> int:
    """8/3 of the hidden size, so that three matrices weigh as much as two of 4x, rounded up."""
    return -(-8 * hidden_size // (3 * MULTIPLE)) * MULTIPLE


@register_ffn("swiglu")
class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)).

    selective recomputation drops nothing here: the activation is cheap, but so is what it would save next to
    the two projections' outputs.
    """

    tp_region = True
    selective = ()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size = config.ffn.intermediate_size or default_intermediate_size(config.hidden_size)
        bias = config.ffn.bias
        self.linear_init = config.linear_init
        self.gate_proj = Linear(config.hidden_size, size, bias=bias)
        self.up_proj = Linear(config.hidden_size, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)
        self.sharding: dict[str, Cut] = {
            "gate_proj.weight": COLUMN,
            "up_proj.weight": COLUMN,
            "down_proj.weight": ROW,
        }
        if bias:
            self.sharding |= {"gate_proj.bias": COLUMN, "up_proj.bias": COLUMN, "down_proj.bias": ROW_BIAS}

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Every configuration will do."""

    def init(self) -> dict[str, Init]:
        table: dict[str, Init] = {
            f"{name}.weight": self.linear_init(*getattr(self, name).weight.shape, last=name == "down_proj")
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        if self.down_proj.bias is not None:
            table |= {f"{name}.bias": ZEROS for name in ("gate_proj", "up_proj", "down_proj")}
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return 2 * length * sum(linear.weight.numel() for linear in linears)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(kernels.swiglu(self.gate_proj(x_BTC), self.up_proj(x_BTC)))
