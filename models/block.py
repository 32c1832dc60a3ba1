"""The block: x + s * mixer(norm(x)), then x + s * ffn(norm(x)).

Shape legend: B batch, T length, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from triptych.models.config import LayerSpec, ModelConfig
from triptych.models.context import Context
from triptych.models.dropout import Dropout
from triptych.models.init import ONES, Init
from triptych.models.linear import unset
from triptych.models.norms import build_norm
from triptych.models.registry import FEEDFORWARDS, MIXERS


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
    ffn_branch.scale. Those of norms and branches stand outside the tensor-parallel regions.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        self.kind = spec.kind
        self.layer = layer
        self.mixer: Any = None
        self.ffn: Any = None
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
        return sum(part.flops(length) for part in (self.mixer, self.ffn) if part is not None)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); under sequence parallelism T is the rank's part."""
        if self.mixer is not None:
            y_BTC = self.mixer(self.mixer_norm(x_BTC), context)
            x_BTC = x_BTC + self.mixer_branch(y_BTC, context.sample_keys)
        if self.ffn is not None:
            y_BTC = self.ffn(self.ffn_norm(x_BTC), context)
            x_BTC = x_BTC + self.ffn_branch(y_BTC, context.sample_keys)
        return x_BTC
