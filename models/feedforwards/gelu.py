"""Feed-forward with GELU (arXiv 1606.08415), in the tanh form.

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


@register_ffn("gelu")
class GELU(nn.Module):
    """down_proj(gelu(up_proj(x))).

    selective recomputation drops nothing in language models, as in arXiv 2205.05198. In denoisers it keeps
    the output of up_proj and computes that of the activation again.
    """

    tp_region = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size = config.ffn.intermediate_size or 4 * config.hidden_size
        bias = config.ffn.bias
        self.linear_init = config.linear_init
        self.selective = () if config.causal else ("down",)
        self.up_proj = Linear(config.hidden_size, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)
        self.sharding: dict[str, Cut] = {"up_proj.weight": COLUMN, "down_proj.weight": ROW}
        if bias:
            self.sharding |= {"up_proj.bias": COLUMN, "down_proj.bias": ROW_BIAS}

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Every configuration will do."""

    def init(self) -> dict[str, Init]:
        table: dict[str, Init] = {
            f"{name}.weight": self.linear_init(*getattr(self, name).weight.shape, last=name == "down_proj")
            for name in ("up_proj", "down_proj")
        }
        if self.down_proj.bias is not None:
            table |= {"up_proj.bias": ZEROS, "down_proj.bias": ZEROS}
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * length * (self.up_proj.weight.numel() + self.down_proj.weight.numel())

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down(self.up_proj(x_BTC))

    def down(self, up_BTF: torch.Tensor) -> torch.Tensor:
        """Output of up_proj (B, T, F) -> (B, T, C)."""
        return self.down_proj(kernels.gelu(up_BTF))
