"""Mamba-2 (arXiv 2405.21060, section 7), with unfused projections.

Shape legend: B batch, T length, C hidden size, I inner channels = H P, H heads, P channels per head,
G groups of heads, N state, K taps of the convolution.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig, require_divides
from triptych.models.context import Context
from triptych.models.init import ONES, Init, InverseSoftplusOfLogUniform, LogOfUniform, Normal
from triptych.models.linear import CausalConv, Linear, unset
from triptych.models.norms import GatedRMSNorm, wide
from triptych.models.registry import register_mixer
from triptych.models.scan import arrange, orders_of, scanned_length
from triptych.models.sharding import COLUMN, ROW, Cut

A_RANGE = (1.0, 16.0)
"""Decay rates -a at initialisation."""


@register_mixer("mamba2", char="M")
class Mamba2(nn.Module):
    """z, x, b, c, dt = projections of the input; x, b, c through convolution and SiLU; then per head
    h_t = exp(dt_t a) h_{t-1} + dt_t x_t ⊗ b_t, y_t = c_t · h_t + d x_t, and out_proj(norm(y * silu(z))).

    Differs from the paper's code: the five projections and three convolutions stand on their own (same
    mathematics), so that each can be cut over ranks; the norm has num_groups groups of channels, as there
    under tensor parallelism.

    In an image (model.scan) the tokens are arranged in scan orders before the projections and put back before
    out_proj; with line_ends, pad_token (C,) stands behind each line.

    selective recomputation keeps the outputs of the five projections and the input of out_proj. It drops, and
    computes again in backward, the convolutions with their SiLU, dt, the scan with its states, and the
    gated norm.
    """

    tp_region = True
    selective = ("core",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings = config.mamba2
        inner, heads = config.mamba2_inner_size, config.mamba2_num_heads
        group_size = settings.num_groups * settings.state_size
        self.layer = layer
        self.settings = settings
        self.std, self.out_std = config.init_std, config.branch_init_std
        self.z_proj = Linear(config.hidden_size, inner, bias=False)
        self.x_proj = Linear(config.hidden_size, inner, bias=False)
        self.b_proj = Linear(config.hidden_size, group_size, bias=False)
        self.c_proj = Linear(config.hidden_size, group_size, bias=False)
        self.dt_proj = Linear(config.hidden_size, heads, bias=False)
        self.conv_x = CausalConv(inner, settings.conv_kernel)
        self.conv_b = CausalConv(group_size, settings.conv_kernel)
        self.conv_c = CausalConv(group_size, settings.conv_kernel)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.a_log = unset(heads, dtype=dtype)
        self.d = unset(heads, dtype=dtype)
        self.dt_bias = unset(heads, dtype=dtype)
        self.norm = GatedRMSNorm(inner, settings.num_groups, config.norm_eps)
        self.out_proj = Linear(inner, config.hidden_size, bias=False)
        self.orders = orders_of(config, layer)
        self.scanned_length = functools.partial(scanned_length, config, layer)
        with_pads = config.scan is not None and config.scan.line_ends
        self.pad_token = unset(config.hidden_size) if with_pads else None
        groups = Cut("groups", count=settings.num_groups)
        per_channel = ("z_proj.weight", "x_proj.weight", "conv_x.weight", "conv_x.bias", "norm.weight")
        per_group = (
            "b_proj.weight",
            "c_proj.weight",
            "conv_b.weight",
            "conv_b.bias",
            "conv_c.weight",
            "conv_c.bias",
        )
        self.sharding = dict.fromkeys((*per_channel, "dt_proj.weight", "a_log", "d", "dt_bias"), COLUMN)
        self.sharding |= dict.fromkeys(per_group, groups)
        self.sharding |= {"out_proj.weight": ROW}

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for sizes and bounds that do not go together."""
        settings = config.mamba2
        if config.mamba2_inner_size != settings.expand * config.hidden_size:
            raise ValueError(
                f"model.mamba2.expand={settings.expand} times model.hidden_size={config.hidden_size} is "
                "not whole; use 2, or another factor that gives a whole number of inner channels"
            )
        require_divides(
            "model.mamba2.head_dim",
            settings.head_dim,
            "model.mamba2.expand * model.hidden_size",
            config.mamba2_inner_size,
        )
        require_divides(
            "model.mamba2.num_groups",
            settings.num_groups,
            "the number of Mamba-2 heads",
            config.mamba2_num_heads,
        )
        if settings.dt_min > settings.dt_max:
            raise ValueError(
                f"model.mamba2.dt_min={settings.dt_min} is above model.mamba2.dt_max={settings.dt_max}; "
                "use a smaller dt_min"
            )
        low, high = settings.dt_limit
        if not 0 <= low < high:
            raise ValueError(f"model.mamba2.dt_limit={settings.dt_limit} is no range; use 0 <= low < high")

    def init(self) -> dict[str, Init]:
        projections = ("z_proj", "x_proj", "b_proj", "c_proj", "dt_proj")
        table: dict[str, Init] = {f"{name}.weight": Normal(self.std) for name in projections}
        table["out_proj.weight"] = Normal(self.out_std)
        table["a_log"] = LogOfUniform(*A_RANGE)
        table["d"] = ONES
        table["dt_bias"] = InverseSoftplusOfLogUniform(self.settings.dt_min, self.settings.dt_max)
        if self.pad_token is not None:
            table["pad_token"] = Normal(self.std)
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence, the scan in chunks: c bᵀ and its product with x within each, the
        states that go in and come out between them. The last chunk counts as full. In an image all but
        out_proj is done for every place of every scan.
        """
        linears = (self.z_proj, self.x_proj, self.b_proj, self.c_proj, self.dt_proj)
        convs = (self.conv_x, self.conv_b, self.conv_c)
        weights = sum(module.weight.numel() for module in (*linears, *convs))
        inner, group_channels = self.x_proj.weight.shape[0], self.b_proj.weight.shape[0]
        places, scans = self.scanned_length(length), max(1, len(self.orders))
        chunk = min(self.settings.chunk_size, places // scans)
        padded = -(-places // scans // chunk) * chunk * scans
        scan = chunk * (group_channels + inner) + 2 * inner * self.settings.state_size
        return 2 * (places * weights + length * self.out_proj.weight.numel() + padded * scan)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC, cu_seqlens, restore = arrange(x_BTC, context, self.orders, self.pad_token)
        y_BTI = self.core(
            self.z_proj(x_BTC),
            self.x_proj(x_BTC),
            self.b_proj(x_BTC),
            self.c_proj(x_BTC),
            self.dt_proj(x_BTC),
            (self.a_log, self.d, self.dt_bias),
            cu_seqlens,
            context,
        )
        return self.out_proj(restore(y_BTI))

    def core(
        self,
        z_BTI: torch.Tensor,
        x_BTI: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        dt_BTH: torch.Tensor,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor | None,
        context: Context,
    ) -> torch.Tensor:
        """Outputs of the projections, b and c (B, T, G N), a_log, d, dt_bias (H,), documents -> (B, T, I).

        The parameters of the mixer itself are arguments, so that recomputation sees those of forward.
        """
        a_log, d, dt_bias = heads
        held = context.cache.layer(self.layer) if context.cache is not None else None
        x_BTI = self.conv_x(x_BTI, cu_seqlens=cu_seqlens, cache=held, cache_name="conv_x")
        b = self.conv_b(b, cu_seqlens=cu_seqlens, cache=held, cache_name="conv_b")
        c = self.conv_c(c, cu_seqlens=cu_seqlens, cache=held, cache_name="conv_c")
        x_BTHP = x_BTI.unflatten(-1, (-1, self.settings.head_dim))
        b_BTGN, c_BTGN = (t.unflatten(-1, (-1, self.settings.state_size)) for t in (b, c))
        inputs = (x_BTHP, dt_BTH, -torch.exp(wide(a_log)), b_BTGN, c_BTGN)
        options: dict[str, Any] = {
            "d": wide(d),
            "dt_bias": wide(dt_bias),
            "dt_softplus": True,
            "dt_limit": self.settings.dt_limit,
        }
        if held is None:
            size = self.settings.chunk_size
            y_BTHP = kernels.ssd(*inputs, **options, cu_seqlens=cu_seqlens, chunk_size=size)
        else:
            y_BTHP = self._scan_with_cache(inputs, options, held)
        return self.norm(y_BTHP.flatten(-2), z_BTI)

    def _scan_with_cache(
        self, inputs: tuple[torch.Tensor, ...], options: dict[str, Any], held: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The scan from held["state"] (B, H, P, N), which it replaces; (B, T, H, P)."""
        x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN = inputs
        if "state" in held and x_BTHP.shape[1] == 1:
            y_BHP, held["state"] = kernels.ssd_step(
                held["state"], x_BTHP[:, 0], dt_BTH[:, 0], a_H, b_BTGN[:, 0], c_BTGN[:, 0], **options
            )
            return y_BHP.unsqueeze(1)
        y_BTHP, held["state"] = kernels.ssd(
            x_BTHP,
            dt_BTH,
            a_H,
            b_BTGN,
            c_BTGN,
            **options,
            initial_state=held.get("state"),
            return_final_state=True,
            chunk_size=self.settings.chunk_size,
        )
        return y_BTHP
