"""Linear and convolution layers that hold parameters and leave their values to models/init.py.

Shape legend: B batch, T length, C channels, K taps.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from triptych import kernels
from triptych.models.init import ZEROS, Init, Uniform


def unset(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter of NaN, so that a model that nobody initialised can't pass for one that somebody did."""
    return nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))


class Linear(nn.Linear):
    """nn.Linear whose values are unset until `initialize`."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(torch.nan)


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU. weight: (C, K), bias: (C,)."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = unset(channels, taps)
        self.bias = unset(channels)

    def init(self) -> dict[str, Init]:
        bound = 1 / math.sqrt(self.weight.shape[1])
        return {"weight": Uniform(-bound, bound), "bias": ZEROS}

    def forward(
        self,
        x_BTC: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        cache: dict[str, torch.Tensor] | None = None,
        cache_name: str = "",
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). Reads and replaces the last K - 1 inputs in cache[cache_name]."""
        if cache is None:
            return kernels.causal_conv1d(
                x_BTC, self.weight, self.bias, activation="silu", cu_seqlens=cu_seqlens
            )
        y, cache[cache_name] = kernels.causal_conv1d(
            x_BTC,
            self.weight,
            self.bias,
            activation="silu",
            initial_state=cache.get(cache_name),
            return_final_state=True,
        )
        return y
