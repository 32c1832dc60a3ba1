"""Heads that read the map of the tokens: a class for every pixel, and boxes.

Shape legend: B batch, T tokens, C hidden size of a stage, D channels of the head, h and w cells of the map,
K classes. A cell is config.stride_of(task) pixels wide and high.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from triptych import kernels
from triptych.models.init import ZEROS, Constant, Init, Normal, Xavier
from triptych.models.linear import Linear, unset
from triptych.models.norms import build_norm
from triptych.models.vision_config import TaskConfig, VisionConfig

Shape = tuple[int, ...]

FOREGROUND_PRIOR = 0.01
"""Probability of each class in each cell at first, so that the many empty cells don't dominate (arXiv
1708.02002)."""
DETECTION_LAYERS = 2
"""3 x 3 convolutions between the map and the boxes."""
SEGMENTATION_LAYERS = 1
"""3 x 3 convolutions between the map and the classes."""


class Neck(nn.Module):
    """Tokens -> a map of D channels: a linear of each token to the cells within it.

    Of a hierarchical backbone every stage has such a linear, and the coarser maps are repeated and added to
    the finest (as in arXiv 1612.03144, without its top-down convolutions). All stages but the last are normed
    here.
    """

    def __init__(self, config: VisionConfig, task: TaskConfig, size: int) -> None:
        super().__init__()
        stages = config.stage_configs
        self.cells = cells_of_a_token(config, task)
        self.prefix = config.num_prefix_tokens
        self.norms = nn.ModuleList(build_norm(stage) for stage in stages[:-1])
        inner = size * math.prod(self.cells)
        self.laterals: Any = nn.ModuleList(Linear(stage.hidden_size, inner) for stage in stages)

    def init(self) -> dict[str, Init]:
        table: dict[str, Init] = {}
        for number, lateral in enumerate(self.laterals):
            table[f"laterals.{number}.weight"] = Xavier(*lateral.weight.shape)
            table[f"laterals.{number}.bias"] = ZEROS
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence of so many tokens in the first stage."""
        grid = length - self.prefix
        return sum(
            2 * (grid >> 2 * stage) * lateral.weight.numel() for stage, lateral in enumerate(self.laterals)
        )

    def forward(
        self, features_BTC: torch.Tensor, earlier: tuple[torch.Tensor, ...], grid: Shape
    ) -> torch.Tensor:
        """features: the last stage's tokens, of this grid; earlier: those of the stages before, first to
        last.

        Returns (B, h, w, D).
        """
        assert len(earlier) == len(self.norms), f"{len(earlier)} earlier stages for {len(self.norms)}"
        dtype: torch.dtype = self.laterals[0].weight.dtype
        halvings = len(earlier)
        total = torch.zeros((), dtype=dtype, device=features_BTC.device)
        for stage, lateral in enumerate(self.laterals):
            last = stage == halvings
            tokens = features_BTC[:, self.prefix :] if last else self.norms[stage](earlier[stage])
            here = tuple(size << (halvings - stage) for size in grid)
            map_BhwK = lateral(tokens.to(dtype)).to(dtype).unflatten(1, here)
            total = total + repeat(map_BhwK, 1 << stage)
        return self._spread(total)

    def _spread(self, map_BhwK: torch.Tensor) -> torch.Tensor:
        """The cells that stand in the channels of a token, onto the map."""
        rows, columns = self.cells
        x = map_BhwK.unflatten(3, (rows, columns, -1))
        return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)


class MapConv(nn.Module):
    """A 3 x 3 convolution over a map, channels last. weight: (D, D, 3, 3), bias: (D,)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = unset(size, size, 3, 3), unset(size)

    def init(self) -> dict[str, Init]:
        fan = self.weight[0].numel()
        return {"weight": Xavier(fan, fan), "bias": ZEROS}

    def forward(self, x_BhwD: torch.Tensor) -> torch.Tensor:
        # Channels stay the fastest dim in memory; only the strides say otherwise.
        x = x_BhwD.to(self.weight.dtype).permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, self.bias, padding=1).permute(0, 2, 3, 1)


class Tower(nn.Module):
    """Norm and GELU, then 3 x 3 convolutions, each with norm and GELU behind it: (B, h, w, D) likewise."""

    def __init__(self, config: VisionConfig, size: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(build_norm(config, size) for _ in range(layers + 1))
        self.convs: Any = nn.ModuleList(MapConv(size) for _ in range(layers))

    def flops(self, cells: int) -> int:
        """Forward FLOPs of one map."""
        return 2 * cells * sum(conv.weight.numel() for conv in self.convs)

    def forward(self, x_BhwD: torch.Tensor) -> torch.Tensor:
        x = kernels.gelu(self.norms[0](x_BhwD))
        for norm, conv in zip(list(self.norms)[1:], self.convs, strict=True):
            x = kernels.gelu(norm(conv(x)))
        return x


class Segment(nn.Module):
    """A class for every cell: logits (B, K, h, w)."""

    def __init__(self, config: VisionConfig, task: TaskConfig) -> None:
        super().__init__()
        assert task.num_classes is not None, "the configuration asks for it"
        size = task.hidden_size or config.stage_configs[-1].hidden_size
        self.neck = Neck(config, task, size)
        self.tower = Tower(config, size, SEGMENTATION_LAYERS)
        self.proj = Linear(size, task.num_classes)
        self.std = config.init_std

    def init(self) -> dict[str, Init]:
        return {"proj.weight": Normal(self.std), "proj.bias": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence of so many tokens in the first stage."""
        cells = (length - self.neck.prefix) * math.prod(self.neck.cells)
        return self.neck.flops(length) + self.tower.flops(cells) + 2 * cells * self.proj.weight.numel()

    def forward(
        self, features_BTC: torch.Tensor, earlier: tuple[torch.Tensor, ...], grid: Shape
    ) -> torch.Tensor:
        dtype = self.proj.weight.dtype
        x_BhwD = self.tower(self.neck(features_BTC, earlier, grid))
        return self.proj(x_BhwD.to(dtype)).to(dtype).permute(0, 3, 1, 2).contiguous()


class Detect(nn.Module):
    """Boxes without anchors (FCOS, arXiv 1904.01355): (B, h w, K + 5).

    For every cell K class logits, the distances from its centre to the left, top, right and bottom of its
    box, at least 0, in strides, and the logit of the centerness. Differs from the paper: one map instead of
    five, a tower in common, softplus instead of exp.
    """

    def __init__(self, config: VisionConfig, task: TaskConfig) -> None:
        super().__init__()
        assert task.num_classes is not None, "the configuration asks for it"
        size = task.hidden_size or config.stage_configs[-1].hidden_size
        self.neck = Neck(config, task, size)
        self.tower = Tower(config, size, DETECTION_LAYERS)
        self.classes = Linear(size, task.num_classes)
        self.sides = Linear(size, 4)
        self.centerness = Linear(size, 1)
        self.std = config.init_std

    def init(self) -> dict[str, Init]:
        table: dict[str, Init] = {
            f"{name}.weight": Normal(self.std) for name in ("classes", "sides", "centerness")
        }
        prior = math.log(FOREGROUND_PRIOR / (1 - FOREGROUND_PRIOR))
        return table | {"classes.bias": Constant(prior), "sides.bias": ZEROS, "centerness.bias": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence of so many tokens in the first stage."""
        cells = (length - self.neck.prefix) * math.prod(self.neck.cells)
        last = sum(linear.weight.numel() for linear in (self.classes, self.sides, self.centerness))
        return self.neck.flops(length) + self.tower.flops(cells) + 2 * cells * last

    def forward(
        self, features_BTC: torch.Tensor, earlier: tuple[torch.Tensor, ...], grid: Shape
    ) -> torch.Tensor:
        dtype = self.classes.weight.dtype
        x_BND = self.tower(self.neck(features_BTC, earlier, grid)).to(dtype).flatten(1, 2)
        sides_BN4 = F.softplus(self.sides(x_BND).to(dtype))
        parts = (self.classes(x_BND).to(dtype), sides_BN4, self.centerness(x_BND).to(dtype))
        return torch.cat(parts, dim=2)


def repeat(map_BhwK: torch.Tensor, factor: int) -> torch.Tensor:
    """Every cell becomes factor x factor cells: (B, h, w, K) -> (B, h factor, w factor, K)."""
    spread = map_BhwK[:, :, None, :, None].expand(-1, -1, factor, -1, factor, -1)
    return spread.flatten(1, 2).flatten(2, 3)


def cells_of_a_token(config: VisionConfig, task: TaskConfig) -> tuple[int, int]:
    """Rows and columns of cells within a token of the first stage.

    Raises ValueError for inputs that are no images, and patches that the stride does not divide.
    """
    name = next(name for name, each in config.tasks.items() if each == task)
    where = f"model.tasks.{name}.kind={task.kind}"
    if len(config.input_size) != 2:
        raise ValueError(
            f"{where} needs images of two axes, and model.input_size={list(config.input_size)} has "
            f"{len(config.input_size)}; remove the task or give images"
        )
    stride = config.stride_of(task)
    if any(patch % stride for patch in config.patch_sizes):
        raise ValueError(
            f"{where} gives a map of {stride} pixels per cell, which does not divide "
            f"patches of {list(config.patch_sizes)} pixels; use another patch_size or (segment) stride"
        )
    rows, columns = (patch // stride for patch in config.patch_sizes)
    return rows, columns
