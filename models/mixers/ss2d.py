"""VMamba's two-dimensional selective scan (arXiv 2401.10166, section 4.2), as its released models have it.

Shape legend: B batch, T length, C hidden size, I inner channels, K = 4 directions, N state per channel, R
rank of the time step, H and W of the grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.init import ONES, Init, InverseSoftplusOfLogUniform, Uniform
from triptych.models.linear import Linear, unset
from triptych.models.mixers.mamba1 import SCAN_PRODUCTS, LogOfState
from triptych.models.norms import wide
from triptych.models.registry import register_mixer
from triptych.models.sharding import COLUMN, ROW, Cut, Shards
from triptych.models.sums import SpanningLayerNorm, sum_inside

DIRECTIONS = ("raster", "column", "raster+reverse", "column+reverse")
"""The cross scan, in the order of the paper's code."""
USER = "mixer ss2d, which scans whole images in four directions,"


class GridConv(nn.Module):
    """Depthwise convolution over the grid of tokens, and SiLU. weight: (C, K, K), no bias."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = unset(channels, taps, taps)

    def init(self) -> dict[str, Init]:
        bound = 1 / self.weight.shape[-1]
        return {"weight": Uniform(-bound, bound)}

    def forward(self, x_BTC: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        image = x_BTC.transpose(1, 2).unflatten(2, grid)
        channels, taps, _ = self.weight.shape
        y = F.conv2d(image, self.weight.unsqueeze(1), padding=taps // 2, groups=channels)
        return F.silu(y.flatten(2).transpose(1, 2))


@register_mixer("ss2d", char="S")
class SS2D(nn.Module):
    """x = silu(conv(in_proj(input))); then in each of four directions (rows, columns, and both backwards),
    with weights of its own, dt, b, c = projections of x, dt through a bottleneck of rank R, and per channel
    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, y_t = c_t h_t + d x_t; out_proj(norm(sum of the four y)).

    The form without a gate ("v05_noz") that the released VMamba-T/S/B have. Weights of the four directions
    are stacked: x_proj.weight (K (R + 2N), I), dt_weight (I, K, R), dt_bias and d (I, K), a_log (I, K, N);
    channels come first, so that they can be cut. The number of parameters is the paper's. b, c and dt need
    every channel of x, of which a rank holds some: their partial sums are added up inside the region, as are
    the norm's. model.scan plays no part.

    selective recomputation keeps the output of in_proj and the input of out_proj. It drops, and computes
    again in backward, the convolution with its SiLU, b, c, dt, the four scans and the norm.
    """

    tp_region = True
    sums_inside = True
    selective = ("core",)
    tread_refusal = "it scans every token of the grid in rows and columns"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings = config.ss2d
        inner, states, count = int(settings.expand * config.hidden_size), settings.state_size, len(DIRECTIONS)
        self.settings = settings
        self.rank = settings.dt_rank or math.ceil(config.hidden_size / 16)
        self.linear_init = config.linear_init
        self.in_proj = Linear(config.hidden_size, inner, bias=False)
        self.conv = GridConv(inner, settings.conv_kernel)
        self.x_proj = Linear(inner, count * (self.rank + 2 * states), bias=False)
        self.dt_weight = unset(inner, count, self.rank)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.dt_bias = unset(inner, count, dtype=dtype)
        self.a_log = unset(inner, count, states, dtype=dtype)
        self.d = unset(inner, count, dtype=dtype)
        self.norm = SpanningLayerNorm(inner, config.norm_eps)
        self.out_proj = Linear(inner, config.hidden_size, bias=False)
        self.shards = Shards()
        per_channel = ("in_proj.weight", "conv.weight", "dt_weight", "dt_bias", "a_log", "d")
        self.sharding: dict[str, Cut] = dict.fromkeys(per_channel, COLUMN)
        self.sharding |= dict.fromkeys(("x_proj.weight", "out_proj.weight"), ROW)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for what is no image, and for sizes and bounds that do not go together."""
        settings, size = config.ss2d, getattr(config, "input_size", None)
        if size is None or len(size) != 2:
            given = f"model.family={config.family}" if size is None else f"model.input_size={list(size)}"
            raise ValueError(
                f"model.pattern={config.pattern!r} has ss2d, which scans the rows and columns of images, and "
                f"{given} has none; use an input_size of two sides, or mamba1"
            )
        if int(settings.expand * config.hidden_size) != settings.expand * config.hidden_size:
            raise ValueError(
                f"model.ss2d.expand={settings.expand} times model.hidden_size={config.hidden_size} is not "
                "whole; use 2, or another factor that gives a whole number of inner channels"
            )
        if settings.conv_kernel % 2 == 0:
            raise ValueError(
                f"model.ss2d.conv_kernel={settings.conv_kernel} has no middle; use an odd number, such as 3"
            )
        if settings.dt_min > settings.dt_max:
            raise ValueError(
                f"model.ss2d.dt_min={settings.dt_min} is above model.ss2d.dt_max={settings.dt_max}; use a "
                "smaller dt_min"
            )

    def init(self) -> dict[str, Init]:
        hidden, inner = self.out_proj.weight.shape
        bound = self.rank**-0.5
        return {
            "in_proj.weight": self.linear_init(inner, hidden),
            "x_proj.weight": self.linear_init(self.x_proj.weight.shape[0] // len(DIRECTIONS), inner),
            "out_proj.weight": self.linear_init(hidden, inner, last=True),
            "dt_weight": Uniform(-bound, bound),
            "dt_bias": InverseSoftplusOfLogUniform(self.settings.dt_min, self.settings.dt_max),
            "a_log": LogOfState(self.settings.state_size),
            "d": ONES,
        }

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        linears = (self.in_proj, self.conv, self.x_proj, self.out_proj)
        weights = sum(module.weight.numel() for module in linears) + self.dt_weight.numel()
        return 2 * length * (weights + SCAN_PRODUCTS * self.a_log.numel())

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). Raises ValueError where rows are packed or tokens routed around it."""
        parameters = (self.dt_weight, self.dt_bias, self.a_log, self.d)
        return self.out_proj(self.core(self.in_proj(x_BTC), parameters, context))

    def core(
        self, x_BTI: torch.Tensor, parameters: tuple[torch.Tensor, ...], context: Context
    ) -> torch.Tensor:
        """Output of in_proj (B, T, I), dt_weight, dt_bias, a_log, d -> input of out_proj (B, T, I).

        The parameters of the mixer itself are arguments, so that recomputation sees those of forward.
        """
        assert context.scan is not None, "images have a scan"
        x_BTI = self.conv(x_BTI, context.scan.whole_grid(USER))
        # Projected before the tokens are put in order: each direction then orders a few channels more.
        inputs = sum_inside(self.x_proj(x_BTI), self.shards).chunk(len(DIRECTIONS), dim=-1)
        y_BTI: torch.Tensor | None = None
        # One after the other: only one direction's copies are alive at a time, and rows need no copy at all.
        for k, (order, dt_b_c) in enumerate(zip(DIRECTIONS, inputs)):
            own = [parameter[:, k] for parameter in parameters]
            y = self._scan(x_BTI, dt_b_c, own, context, order)
            y_BTI = y if y_BTI is None else y_BTI + y
        return self.norm(y_BTI)

    def _scan(
        self, x: torch.Tensor, dt_b_c: torch.Tensor, own: list[torch.Tensor], context: Context, order: str
    ) -> torch.Tensor:
        """x (B, T, I), dt, b and c (B, T, R + 2N) and the direction's own parameters -> (B, T, I)."""
        assert context.scan is not None, "images have a scan"
        dt_weight, dt_bias, a_log, d = own
        x, _, restore = context.scan.arrange(x, (order,))
        states = self.settings.state_size
        dt, b, c = context.scan.arrange(dt_b_c, (order,)).x.split([self.rank, states, states], dim=-1)
        y = kernels.selective_scan(
            x,
            F.linear(dt, dt_weight),
            -torch.exp(wide(a_log)),
            b,
            c,
            d=wide(d),
            dt_bias=wide(dt_bias),
            chunk_size=self.settings.chunk_size,
        )
        return restore(y)
