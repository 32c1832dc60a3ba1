"""Dropout whose mask belongs to the sample, not to the rank.

Shape legend: B batch, T length, D hidden size, H heads, S keys.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from triptych import kernels
from triptych.kernels import string_key


class Dropout(nn.Module):
    """Sets a share p of the elements to zero in training, and scales the others by 1 / (1 - p).

    An element's mask is a function of its sample's key, of the module's name (`salt`) and of the element's
    place in the sample's whole tensor, so it is the same under every layout and in recomputation.

    `cut` says what stands in dim 1 of the input: the "sequence" of (B, T, D), or the "heads" of (B, H, T, S).
    Where that dim is cut over ranks (sequence parallelism; heads of a cut attention), parallel/tensor.py sets
    shard_rank and shard_count; the cuts are equal.
    """

    shard_dim = 1

    def __init__(self, p: float, cut: Literal["sequence", "heads"]) -> None:
        super().__init__()
        self.p = p
        self.cut = cut
        self.salt = 0
        self.shard_rank = 0
        self.shard_count = 1

    def forward(self, x: torch.Tensor, sample_keys: torch.Tensor | None) -> torch.Tensor:
        """x: (B, ...), sample_keys: int64 (B,). Raises ValueError without keys in training."""
        if not self.training or self.p == 0:
            return x
        if sample_keys is None:
            raise ValueError(f"dropout={self.p} in training needs sample_keys, one int64 per sample")
        start = [0] * (x.ndim - 1)
        shape = list(x.shape[1:])
        start[self.shard_dim - 1] = self.shard_rank * x.shape[self.shard_dim]
        shape[self.shard_dim - 1] = self.shard_count * x.shape[self.shard_dim]
        return kernels.dropout(x, self.p, sample_keys ^ self.salt, start=tuple(start), shape=tuple(shape))

    def extra_repr(self) -> str:
        return f"p={self.p}, cut={self.cut!r}"


def salt_dropouts(model: nn.Module) -> None:
    """Gives every Dropout in the model the salt of its name."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.salt = string_key(0, name)
