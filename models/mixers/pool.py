"""Average pooling in place of a mixer (PoolFormer, arXiv 2111.11418).

Shape legend: B batch, T length, C hidden size.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.init import Init
from triptych.models.registry import register_mixer
from triptych.models.sharding import Shards

USER = "mixer pool, which takes means over neighbours on the grid,"


def neighbourhood_means(x: torch.Tensor) -> torch.Tensor:
    """(B, C, *grid) -> of each place the mean over it and its neighbours, of a grid of 1, 2 or 3 axes."""
    pool = functools.partial(F.avg_pool2d, stride=1, count_include_pad=False)
    if x.ndim == 3:
        return pool(x.unsqueeze(-1), (3, 1), padding=(1, 0)).squeeze(-1)
    if x.ndim == 4:
        return pool(x, 3, padding=1)
    # A mean over a box is a mean over frames of means within frames.
    frames = pool(x.flatten(1, 2), 3, padding=1).flatten(2).unflatten(1, x.shape[1:3])
    return pool(frames, (3, 1), padding=(1, 0)).unflatten(-1, x.shape[3:])


@register_mixer("pool", char="p")
class Pool(nn.Module):
    """The mean of a token and its neighbours (3 along each axis of the grid, fewer at the edge), minus the
    token. No parameters.

    Every tensor-parallel rank computes the whole of it and returns its share.
    """

    tp_region = True
    sums_inside = True
    selective = ()
    tread_refusal = "it needs the neighbours of every token on the grid"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.shards = Shards()

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for a model whose tokens stand on no grid."""
        if getattr(config, "input_size", None) is None:
            raise ValueError(
                f"model.pattern={config.pattern!r} has pool, which looks at neighbours on a grid, and "
                f"model.family={config.family} has none; use mamba1, mamba2 or attention"
            )

    def init(self) -> dict[str, Init]:
        return {}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence: there is no matmul and no scan."""
        return 0

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). Raises ValueError where rows are packed or tokens routed around it."""
        assert context.scan is not None, "images have a scan"
        grid = context.scan.whole_grid(USER)
        means = neighbourhood_means(x_BTC.transpose(1, 2).unflatten(2, grid))
        y_BTC = means.flatten(2).transpose(1, 2) - x_BTC
        return y_BTC if self.shards.count == 1 else y_BTC / self.shards.count
