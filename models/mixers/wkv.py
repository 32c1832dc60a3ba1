"""Spatial mix of Vision-RWKV (arXiv 2403.02308) and Diffusion-RWKV (arXiv 2404.04478).

Shape legend: B batch, T length, C hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.init import Init
from triptych.models.linear import Linear, unset
from triptych.models.registry import register_mixer
from triptych.models.sharding import COLUMN, ROW, Cut
from triptych.models.shift import Ramp, Zigzag, check_shift, mix, shift_axes, shifted

WKV_PRODUCTS = 2 * 2
"""Multiply-adds of WKV per token and channel: numerator and denominator, in two directions."""


@register_mixer("wkv", char="W")
class WKV(nn.Module):
    """r, k, v = projections of the input mixed with its neighbours (models/shift.py), each with its own mu;
    out_proj(sigmoid(r) * wkv(k, v)), where wkv is a mean of v over all tokens of the image, weighted by
    exp(k) and with the distance in raster order by spatial_decay; by spatial_first for the token itself.

    As in the published code, whose weights fit, spatial_decay and spatial_first are both divided by the
    number of tokens (the papers' equation divides the first alone), and spatial_decay may have either sign.

    selective recomputation keeps the outputs of the three projections and the input of out_proj. It drops,
    and computes again in backward, wkv and the gate.
    """

    tp_region = True
    selective = ("core",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.depth = layer / config.num_layers
        self.place = layer / max(1, config.num_layers - 1)
        self.axes = shift_axes(config)
        self.linear_init = config.linear_init
        self.mu_r, self.mu_k, self.mu_v = (unset(size) if self.axes else None for _ in range(3))
        self.r_proj = Linear(size, size, bias=False)
        self.k_proj = Linear(size, size, bias=False)
        self.v_proj = Linear(size, size, bias=False)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.spatial_decay = unset(size, dtype=dtype)
        self.spatial_first = unset(size, dtype=dtype)
        self.out_proj = Linear(size, size, bias=False)
        per_channel = ("r_proj.weight", "k_proj.weight", "v_proj.weight", "spatial_decay", "spatial_first")
        self.sharding: dict[str, Cut] = {**dict.fromkeys(per_channel, COLUMN), "out_proj.weight": ROW}

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for a model that must not look ahead."""
        if config.causal:
            raise ValueError(
                f"model.pattern={config.pattern!r} has wkv, which looks at tokens on both sides, and "
                f"model.family={config.family} must not look ahead; use mamba1, mamba2 or attention"
            )
        check_shift(config, "wkv")

    def init(self) -> dict[str, Init]:
        """As published ("fancy"): from the first layer to the last, inputs are mixed with their neighbours in
        more and more channels, and fewer channels look far."""
        size = self.out_proj.weight.shape[0]
        table: dict[str, Init] = {
            f"{name}.weight": self.linear_init(size, size, last=name == "out_proj")
            for name in ("r_proj", "k_proj", "v_proj", "out_proj")
        }
        if self.axes:
            table["mu_r"] = Ramp(size, 0.5 * (1 - self.depth))
            table["mu_k"] = Ramp(size, 1 - self.depth)
            table["mu_v"] = Ramp(size, 1 - self.depth, low=0.3 * self.place)
        table["spatial_decay"] = Ramp(max(1, size - 1), 0.7 + 1.3 * self.place, low=-5.0, span=8.0)
        table["spatial_first"] = Zigzag()
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        linears = (self.r_proj, self.k_proj, self.v_proj, self.out_proj)
        weights = sum(linear.weight.numel() for linear in linears)
        return 2 * length * (weights + WKV_PRODUCTS * self.spatial_decay.numel())

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        r = k = v = x_BTC
        if self.mu_r is not None and self.mu_k is not None and self.mu_v is not None:
            neighbours = shifted(x_BTC, context, self.axes)
            r, k, v = (mix(x_BTC, neighbours, mu) for mu in (self.mu_r, self.mu_k, self.mu_v))
        y_BTC = self.core(
            self.r_proj(r),
            self.k_proj(k),
            self.v_proj(v),
            (self.spatial_decay, self.spatial_first),
            context.cu_seqlens,
        )
        return self.out_proj(y_BTC)

    def core(
        self,
        r: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parameters: tuple[torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Outputs of the projections (B, T, C), spatial_decay and spatial_first (C,), documents -> (B, T, C).

        The parameters of the mixer itself are arguments, so that recomputation sees those of forward.
        """
        decay, first = parameters
        return torch.sigmoid(r) * kernels.wkv(k, v, decay, first, divide_u=True, cu_seqlens=cu_seqlens)
