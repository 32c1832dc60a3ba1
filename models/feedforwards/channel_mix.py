"""Channel mix of Vision-RWKV (arXiv 2403.02308) and Diffusion-RWKV (arXiv 2404.04478).

Shape legend: B batch, T length, C hidden size, F intermediate size.
"""

from __future__ import annotations

import torch
from torch import nn

from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.init import Init
from triptych.models.linear import Linear, unset
from triptych.models.registry import register_ffn
from triptych.models.sharding import COLUMN, REPLICATE, ROW, Cut
from triptych.models.shift import Ramp, check_shift, mix, shift_axes, shifted


@register_ffn("channel_mix")
class ChannelMix(nn.Module):
    """sigmoid(r_proj(xr)) * v_proj(relu(k_proj(xk))²), where xr and xk are the input mixed with its
    neighbours (models/shift.py), each with its own mu.

    The gate is computed whole on every rank and multiplies the rank's partial sum.
    selective recomputation drops nothing here.
    """

    tp_region = True
    selective = ()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        size = config.ffn.intermediate_size or 4 * hidden
        self.depth = layer / config.num_layers
        self.axes = shift_axes(config)
        self.linear_init = config.linear_init
        self.mu_r, self.mu_k = (unset(hidden) if self.axes else None for _ in range(2))
        self.r_proj = Linear(hidden, hidden, bias=False)
        self.k_proj = Linear(hidden, size, bias=False)
        self.v_proj = Linear(size, hidden, bias=False)
        self.sharding: dict[str, Cut] = {
            "r_proj.weight": REPLICATE,
            "k_proj.weight": COLUMN,
            "v_proj.weight": ROW,
        }

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for biases, and where tokens have no neighbours."""
        if config.ffn.bias:
            raise ValueError("model.ffn.bias=true with channel_mix, which has no biases; use bias: false")
        check_shift(config, "channel_mix")

    def init(self) -> dict[str, Init]:
        """As published ("fancy")."""
        table: dict[str, Init] = {
            f"{name}.weight": self.linear_init(*getattr(self, name).weight.shape, last=name == "v_proj")
            for name in ("r_proj", "k_proj", "v_proj")
        }
        if self.axes:
            ramp = Ramp(self.r_proj.weight.shape[0], 1 - self.depth)
            table |= {"mu_r": ramp, "mu_k": ramp}
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        linears = (self.r_proj, self.k_proj, self.v_proj)
        return 2 * length * sum(linear.weight.numel() for linear in linears)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        r = k = x_BTC
        if self.mu_r is not None and self.mu_k is not None:
            neighbours = shifted(x_BTC, context, self.axes)
            r, k = (mix(x_BTC, neighbours, mu) for mu in (self.mu_r, self.mu_k))
        return torch.sigmoid(self.r_proj(r)) * self.v_proj(torch.relu(self.k_proj(k)).square())
