"""TREAD (arXiv 2501.04765): in training a part of the tokens goes around a range of blocks.

Shape legend: B batch, T length, K tokens kept, C hidden size.
"""

from __future__ import annotations

import torch
from torch import nn


class Leave(nn.Module):
    """The tokens that stay in the blocks, in the order they have."""

    sequence = "whole"

    def forward(self, x_BTC: torch.Tensor, kept_BK: torch.Tensor) -> torch.Tensor:
        return take(x_BTC, kept_BK)


class Return(nn.Module):
    """The tokens that went around, and at their places those that stayed."""

    sequence = "whole"

    def forward(self, x_BKC: torch.Tensor, aside_BTC: torch.Tensor, kept_BK: torch.Tensor) -> torch.Tensor:
        index = kept_BK.unsqueeze(-1).expand(-1, -1, x_BKC.shape[-1])
        return aside_BTC.scatter(1, index, x_BKC)


def take(x: torch.Tensor, kept_BK: torch.Tensor) -> torch.Tensor:
    """Rows `kept` of x, (B | 1, T, ...) -> (B, K, ...)."""
    index = kept_BK.reshape(*kept_BK.shape, *(1,) * (x.ndim - 2))
    x = x.expand(kept_BK.shape[0], *x.shape[1:])
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
