"""The block: x + s * mixer(norm(x)), then x + s * ffn(norm(x)).

In a denoiser each branch is modulated: x + gate * s * f(norm(x) * (1 + scale) + shift).

Shape legend: B batch, T length, C hidden size.
"""

from __future__ import annotations

from collections.abc import ValuesView
from typing import Any, cast

import torch
from torch import nn

from triptych import kernels
from triptych.models.conditioning import Modulation, modulated
from triptych.models.config import LayerSpec, ModelConfig
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.dropout import Dropout
from triptych.models.init import ONES, ZEROS, Init
from triptych.models.linear import Linear, unset
from triptych.models.norms import build_norm
from triptych.models.registry import FEEDFORWARDS, MIXERS

PER_BRANCH = 3
"""Shift, scale and gate."""


class Branch(nn.Module):
    """s * dropout(f(x)): what follows a mixer or feed-forward before it joins the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        learned = config.residual_scale == "learned"
        self.constant = config.depth_scale if config.residual_scale == "depth" else 1.0
        self.scale = unset(config.hidden_size) if learned else None
        self.dropout = Dropout(config.dropout, cut="sequence")

    def init(self) -> dict[str, Init]:
        return {"scale": ONES} if self.scale is not None else {}

    def forward(self, y_BTC: torch.Tensor, sample_keys: torch.Tensor | None) -> torch.Tensor:
        y_BTC = self.dropout(y_BTC, sample_keys)
        if self.scale is not None:
            return y_BTC * self.scale
        # Without a factor nothing is computed, so that nothing is stored.
        return y_BTC if self.constant == 1.0 else y_BTC * self.constant


class Block(nn.Module):
    """One layer of the pattern; mixer or ffn may be absent, together with its norm.

    Parameters: mixer_norm, mixer, mixer_branch.scale (learned residual scale only), ffn_norm, ffn,
    ffn_branch.scale; in denoisers modulation, and skip where a long skip arrives. Those of norms, branches,
    modulation and skip stand outside the tensor-parallel regions.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        self.kind = spec.kind
        self.layer = layer
        self.mixer: Any = None
        self.ffn: Any = None
        self.modulation: Modulation | None = None
        self.skip: LongSkip | None = None
        if isinstance(config, DiffusionConfig):
            branches = sum(part is not None for part in spec)
            rank = config.modulation.rank if config.modulation.kind == "lora" else None
            self.modulation = Modulation(config.hidden_size, PER_BRANCH * branches, rank)
            if config.skips_from(layer) is not None:
                self.skip = LongSkip(config)
        if spec.mixer is not None:
            self.mixer_norm = build_norm(config)
            self.mixer = MIXERS[spec.mixer](config, layer)
            self.mixer_branch = Branch(config)
        if spec.ffn is not None:
            self.ffn_norm = build_norm(config)
            self.ffn = FEEDFORWARDS[spec.ffn](config, layer)
            self.ffn_branch = Branch(config)

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence of `length` tokens: matmuls and scans, not norms and activations."""
        parts = sum(part.flops(length) for part in (self.mixer, self.ffn, self.skip) if part is not None)
        return parts + (0 if self.modulation is None else self.modulation.flops())

    def forward(
        self, x_BTC: torch.Tensor, context: Context, skip_BTC: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); under sequence parallelism T is the rank's part. skip: of a long skip."""
        if self.skip is not None and skip_BTC is not None:
            x_BTC = self.skip(x_BTC, skip_BTC)
        modulation = iter(() if self.modulation is None else self.modulation(context))
        if self.mixer is not None:
            x_BTC = self._branch(x_BTC, self.mixer_norm, self.mixer, self.mixer_branch, modulation, context)
        if self.ffn is not None:
            x_BTC = self._branch(x_BTC, self.ffn_norm, self.ffn, self.ffn_branch, modulation, context)
        return x_BTC

    def _branch(
        self, x_BTC: torch.Tensor, norm: Any, f: Any, branch: Any, modulation: Any, context: Context
    ) -> torch.Tensor:
        if self.modulation is None:
            return x_BTC + branch(f(norm(x_BTC), context), context.sample_keys)
        shift, scale, gate = next(modulation), next(modulation), next(modulation)
        y_BTC = branch(f(modulated(norm, x_BTC, shift, scale), context), context.sample_keys)
        return kernels.gated_residual(x_BTC, y_BTC, gate)


class LongSkip(nn.Module):
    """proj([x, skip]): how the output of an earlier block joins (U-ViT, arXiv 2209.12152)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.linear_init = config.linear_init

    def init(self) -> dict[str, Init]:
        return {"proj.weight": self.linear_init(*self.proj.weight.shape), "proj.bias": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * length * self.proj.weight.numel()

    def forward(self, x_BTC: torch.Tensor, skip_BTC: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.cat([x_BTC, skip_BTC], dim=-1)).to(x_BTC.dtype)


class Blocks(nn.ModuleDict):
    """Blocks by their number in the whole model, written as a string."""

    def values(self) -> ValuesView[Block]:
        return cast("ValuesView[Block]", super().values())


def build_blocks(config: ModelConfig, layers: range | None) -> Blocks:
    """Blocks `layers` of the pattern, None for all. Raises ValueError for layers outside the model."""
    layers = range(config.num_layers) if layers is None else layers
    if len(layers) and not 0 <= min(layers) <= max(layers) < config.num_layers:
        raise ValueError(f"layers={layers} leaves the model; it has model.num_layers={config.num_layers}")
    specs, stages = config.layer_specs(), config.stage_configs
    return Blocks(
        {str(layer): Block(stages[config.stage_of(layer)], specs[layer], layer) for layer in layers}
    )
