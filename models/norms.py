"""Norms. Statistics are in fp32, in fp64 for fp64.

Shape legend: B batch, T length, C channels, G groups of channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from triptych import kernels
from triptych.kernels import autocast_dtype, statistics_dtype
from triptych.models.config import ModelConfig
from triptych.models.init import ONES, ZEROS, Init
from triptych.models.linear import unset
from triptych.models.sharding import Shards


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32; fp64 stays fp64."""
    return x.to(statistics_dtype(x))


def to_compute(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of autocast, where it is on.

    Done once on a norm's output, it spares each of the linears that follow a copy of its own (autocast
    keeps none of activations), and collectives send the smaller type.
    """
    return x.to(autocast_dtype(x) or x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dim (arXiv 1910.07467)."""

    def __init__(self, channels: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.weight = unset(channels) if affine else None
        self.eps = eps

    def init(self) -> dict[str, Init]:
        return {} if self.weight is None else {"weight": ONES}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        return to_compute(kernels.rms_norm(x, weight, eps=self.eps))


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias, over the last dim (arXiv 1607.06450)."""

    def __init__(self, channels: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.weight = unset(channels) if affine else None
        self.bias = unset(channels) if affine else None
        self.eps = eps

    def init(self) -> dict[str, Init]:
        return {} if self.weight is None else {"weight": ONES, "bias": ZEROS}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return to_compute(kernels.layer_norm(x, self.weight, self.bias, self.eps))


def build_norm(config: ModelConfig, channels: int | None = None) -> nn.Module:
    """A norm as the configuration wants it, over `channels` (unset: hidden_size)."""
    norm = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return norm(channels or config.hidden_size, config.norm_eps, config.norm_affine)


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(gate) in groups of channels (Mamba-2): each of `num_groups` has its own rms.

    weight: (C,), cut by "column" (the mixer's table). How many groups are held is inferred from its shape.
    Where ranks hold several whole groups, or one, nothing crosses shards and `shards` stays as it is.

    Where tp > num_groups a group spans tp / num_groups neighbouring ranks. parallel/tensor.py must then set
    `shards` to an object with
        start = tp_rank // (tp // num_groups), the global number of the group that the rank's channels are in,
        count = tp, and
        sum = all-reduce over the whole tp axis (not only the ranks of the group) without autograd:
    each rank puts its sum of squares, (B, T, 1), in slot `start` of a (B, T, num_groups) tensor of zeros, and
    reads that slot of the sum. Backward sums once more in the same way.
    """

    def __init__(self, channels: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = unset(channels)
        self.num_groups = num_groups
        self.group_size = channels // num_groups
        self.eps = eps
        self.shards = Shards()

    def init(self) -> dict[str, Init]:
        return {"weight": ONES}

    def forward(self, x_BTC: torch.Tensor, gate_BTC: torch.Tensor) -> torch.Tensor:
        if self.weight.shape[0] >= self.group_size:
            return kernels.gated_rms_norm(
                x_BTC, gate_BTC, self.weight, eps=self.eps, group_size=self.group_size
            )
        return _SpanningGatedRMSNorm.apply(x_BTC, gate_BTC, self.weight, self)

    def sum_of_group(self, partial_BT1: torch.Tensor) -> torch.Tensor:
        """Partial sums over the channels held -> sums over the group, (B, T, 1)."""
        own, groups = self.shards.start, self.num_groups
        slots = F.pad(partial_BT1, (own, groups - 1 - own))
        return self.shards.sum(slots)[..., own : own + 1]


class _SpanningGatedRMSNorm(torch.autograd.Function):
    """GatedRMSNorm of one group that spans several shards. Saves the inputs and 1/rms.

    With u = x silu(g), n = u r, r = (sum(u²)/M + eps)^-1/2 over the group's M channels and y = n w:
    du = r (dy w - n sum(dy w n) / M), where both sums run over all shards of the group.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, norm: GatedRMSNorm
    ) -> torch.Tensor:
        u = wide(x) * F.silu(wide(gate))
        square = norm.sum_of_group(u.square().sum(-1, keepdim=True))
        rstd = torch.rsqrt(square / norm.group_size + norm.eps)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.norm = norm
        return (u * rstd * wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, gate, weight, rstd = ctx.saved_tensors
        dy, g = wide(grads[0]), wide(gate)
        sigmoid = torch.sigmoid(g)
        silu = g * sigmoid
        n = wide(x) * silu * rstd
        dn = dy * wide(weight)
        mean = ctx.norm.sum_of_group((dn * n).sum(-1, keepdim=True)) / ctx.norm.group_size
        du = rstd * (dn - n * mean)
        dgate = du * wide(x) * (sigmoid + silu * (1 - sigmoid))
        dweight = (dy * n).flatten(0, -2).sum(0)
        return (du * silu).to(x.dtype), dgate.to(gate.dtype), dweight.to(weight.dtype), None
