"""Mamba-1 (arXiv 2312.00752, section 3.4), with unfused projections.

Shape legend: B batch, T length, C hidden size, I inner channels, N state per channel, R rank of the time
step, K taps of the convolution.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.init import ONES, Init, InverseSoftplusOfLogUniform, Normal, Uniform
from triptych.models.linear import CausalConv, Linear, unset
from triptych.models.norms import wide
from triptych.models.registry import register_mixer
from triptych.models.scan import arrange, orders_of, scanned_length
from triptych.models.sharding import COLUMN, ROW, Cut, Shards
from triptych.models.sums import sum_inside

SCAN_PRODUCTS = 3
"""Multiply-adds of the scan per token, channel and state."""


@dataclass(frozen=True)
class LogOfState:
    """log(n) for the n-th of N states, of every channel: a_log of Mamba-1 (S4D-real)."""

    states: int

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return (index % self.states + 1).double().log()


@register_mixer("mamba1", char="m")
class Mamba1(nn.Module):
    """z, x = projections of the input; x through convolution and SiLU; b, c, dt = projections of that x, dt
    through a bottleneck of rank R; then per channel h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t,
    y_t = c_t · h_t + d x_t, and out_proj(y * silu(z)).

    Differs from the paper's code: projections that are one there stand on their own (same mathematics), so
    that each can be cut over ranks. b, c and dt need every channel of x, of which a rank holds some: their
    partial sums are added up inside the region, once for all three.

    In an image (model.scan) the tokens are arranged in scan orders before the projections and put back before
    out_proj; with line_ends, pad_token (C,) stands behind each line.

    selective recomputation keeps the outputs of z_proj and x_proj and the input of out_proj. It drops, and
    computes again in backward, the convolution with its SiLU, b, c, dt and their sum, the scan with its
    states, and the gate.
    """

    tp_region = True
    sums_inside = True
    selective = ("core",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings = config.mamba1
        inner, states = int(settings.expand * config.hidden_size), settings.state_size
        self.layer = layer
        self.settings = settings
        self.rank = settings.dt_rank or math.ceil(config.hidden_size / 16)
        self.init_std, self.linear_init = config.init_std, config.linear_init
        self.z_proj = Linear(config.hidden_size, inner, bias=False)
        self.x_proj = Linear(config.hidden_size, inner, bias=False)
        self.conv_x = CausalConv(inner, settings.conv_kernel)
        self.dt_down = Linear(inner, self.rank, bias=False)
        self.b_proj = Linear(inner, states, bias=False)
        self.c_proj = Linear(inner, states, bias=False)
        self.dt_up = Linear(self.rank, inner, bias=False)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.dt_bias = unset(inner, dtype=dtype)
        self.a_log = unset(inner, states, dtype=dtype)
        self.d = unset(inner, dtype=dtype)
        self.out_proj = Linear(inner, config.hidden_size, bias=False)
        self.orders = orders_of(config, layer)
        self.scanned_length = functools.partial(scanned_length, config, layer)
        with_pads = config.scan is not None and config.scan.line_ends
        self.pad_token = unset(config.hidden_size) if with_pads else None
        self.shards = Shards()
        per_channel = ("z_proj.weight", "x_proj.weight", "conv_x.weight", "conv_x.bias", "dt_up.weight")
        of_channels = ("dt_down.weight", "b_proj.weight", "c_proj.weight", "out_proj.weight")
        self.sharding: dict[str, Cut] = dict.fromkeys((*per_channel, "dt_bias", "a_log", "d"), COLUMN)
        self.sharding |= dict.fromkeys(of_channels, ROW)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for sizes and bounds that do not go together."""
        settings = config.mamba1
        if int(settings.expand * config.hidden_size) != settings.expand * config.hidden_size:
            raise ValueError(
                f"model.mamba1.expand={settings.expand} times model.hidden_size={config.hidden_size} is "
                "not whole; use 2, or another factor that gives a whole number of inner channels"
            )
        if settings.dt_min > settings.dt_max:
            raise ValueError(
                f"model.mamba1.dt_min={settings.dt_min} is above model.mamba1.dt_max={settings.dt_max}; "
                "use a smaller dt_min"
            )

    def init(self) -> dict[str, Init]:
        projections = ("z_proj", "x_proj", "dt_down", "b_proj", "c_proj", "out_proj")
        table: dict[str, Init] = {
            f"{name}.weight": self.linear_init(*getattr(self, name).weight.shape, last=name == "out_proj")
            for name in projections
        }
        bound = self.rank**-0.5
        table["dt_up.weight"] = Uniform(-bound, bound)
        table["dt_bias"] = InverseSoftplusOfLogUniform(self.settings.dt_min, self.settings.dt_max)
        table["a_log"] = LogOfState(self.settings.state_size)
        table["d"] = ONES
        if self.pad_token is not None:
            table["pad_token"] = Normal(self.init_std)
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence; all but out_proj are of every place of every scan in an image."""
        inside = (self.z_proj, self.x_proj, self.conv_x, self.dt_down, self.b_proj, self.c_proj, self.dt_up)
        weights = sum(module.weight.numel() for module in inside) + SCAN_PRODUCTS * self.a_log.numel()
        return 2 * (self.scanned_length(length) * weights + length * self.out_proj.weight.numel())

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC, cu_seqlens, restore = arrange(x_BTC, context, self.orders, self.pad_token)
        parameters = (self.a_log, self.d, self.dt_bias)
        y_BTI = self.core(self.z_proj(x_BTC), self.x_proj(x_BTC), parameters, cu_seqlens, context)
        return self.out_proj(restore(y_BTI))

    def core(
        self,
        z_BTI: torch.Tensor,
        x_BTI: torch.Tensor,
        parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor | None,
        context: Context,
    ) -> torch.Tensor:
        """Outputs of the projections (B, T, I), a_log (I, N), d and dt_bias (I,), documents -> (B, T, I).

        The parameters of the mixer itself are arguments, so that recomputation sees those of forward.
        """
        a_log, d, dt_bias = parameters
        held = context.cache.layer(self.layer) if context.cache is not None else None
        x_BTI = self.conv_x(x_BTI, cu_seqlens=cu_seqlens, cache=held, cache_name="conv_x")
        partial = torch.cat([self.dt_down(x_BTI), self.b_proj(x_BTI), self.c_proj(x_BTI)], dim=-1)
        states = self.settings.state_size
        dt_BTR, b_BTN, c_BTN = sum_inside(partial, self.shards).split([self.rank, states, states], dim=-1)
        inputs = (x_BTI, self.dt_up(dt_BTR), -torch.exp(wide(a_log)), b_BTN, c_BTN)
        options: dict[str, Any] = {"d": wide(d), "z": z_BTI, "dt_bias": wide(dt_bias)}
        if held is not None:
            return self._scan_with_cache(inputs, options, held)
        return kernels.selective_scan(
            *inputs, **options, cu_seqlens=cu_seqlens, chunk_size=self.settings.chunk_size
        )

    def _scan_with_cache(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        options: dict[str, Any],
        held: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The scan from held["state"] (B, I, N), which it replaces; (B, T, I)."""
        x, dt, a, b, c = inputs
        if "state" in held and x.shape[1] == 1:
            y_BI, held["state"] = kernels.selective_scan_step(
                held["state"],
                x[:, 0],
                dt[:, 0],
                a,
                b[:, 0],
                c[:, 0],
                d=options["d"],
                z=options["z"][:, 0],
                dt_bias=options["dt_bias"],
            )
            return y_BI.unsqueeze(1)
        y_BTI, held["state"] = kernels.selective_scan(
            *inputs,
            **options,
            initial_state=held.get("state"),
            return_final_state=True,
            chunk_size=self.settings.chunk_size,
        )
        return y_BTI
