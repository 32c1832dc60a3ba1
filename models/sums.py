"""Sums over tensor-parallel shards amid a region (models/sharding.py: `sums_inside`).

Shape legend: B batch, T length, C channels, of which a shard holds some.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from triptych import kernels
from triptych.models.init import ONES, ZEROS, Init
from triptych.models.linear import unset
from triptych.models.norms import to_compute, wide
from triptych.models.sharding import COLUMN, Cut, Shards


def sum_inside(partial: torch.Tensor, shards: Shards) -> torch.Tensor:
    """Partial sums -> their sum, which each shard uses for its own channels or heads."""
    return _SumInside.apply(partial, shards) if shards.count > 1 else partial


class _SumInside(torch.autograd.Function):
    """Each shard uses the sum in its own way, so the gradient of every partial sum is the sum of the shards'
    gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return shards.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shards.sum(grads[0]), None


class SpanningLayerNorm(nn.Module):
    """Layer norm over channels that several shards hold. weight, bias: (C,), cut by "column".

    channels: of all shards.
    """

    sums_inside = True

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = unset(channels)
        self.bias = unset(channels)
        self.channels = channels
        self.eps = eps
        self.shards = Shards()
        self.sharding: dict[str, Cut] = {"weight": COLUMN, "bias": COLUMN}

    def init(self) -> dict[str, Init]:
        return {"weight": ONES, "bias": ZEROS}

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), of the channels held."""
        if self.shards.count == 1:
            return to_compute(kernels.layer_norm(x_BTC, self.weight, self.bias, self.eps))
        normed = _SpanningLayerNorm.apply(x_BTC, self.weight, self.bias, self.channels, self.eps, self.shards)
        return to_compute(normed)


class _SpanningLayerNorm(torch.autograd.Function):
    """Saves the input, and mean and 1/std of each token.

    With n = (x - mean) r, y = n w + b and g = dy w over M channels: dx = r (g - sum(g)/M - n sum(g n)/M),
    where the sums run over all shards. The variance is summed around the mean, so that nothing cancels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        channels: int,
        eps: float,
        shards: Shards,
    ) -> torch.Tensor:
        mean = shards.sum(wide(x).sum(-1, keepdim=True)) / channels
        centred = wide(x) - mean
        rstd = torch.rsqrt(shards.sum(centred.square().sum(-1, keepdim=True)) / channels + eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.channels, ctx.shards = channels, shards
        return torch.addcmul(wide(bias), centred * rstd, wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy = wide(grads[0])
        n = (wide(x) - mean) * rstd
        g = dy * wide(weight)
        sums = torch.stack([g.sum(-1), (g * n).sum(-1)], dim=-1)
        mean_g, mean_gn = (ctx.shards.sum(sums) / ctx.channels).split(1, dim=-1)
        dx = rstd * (g - mean_g - n * mean_gn)
        dweight, dbias = ((v.flatten(0, -2).sum(0)) for v in (dy * n, dy))
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None
