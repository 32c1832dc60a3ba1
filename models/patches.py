"""Patches to tokens, and in a denoiser tokens to patches.

Shape legend: B batch, T length, C hidden size, P values of a patch, channel-major, A axes of the grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from triptych.models.conditioning import Modulation, modulated
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import ZEROS, Init, Normal, Xavier
from triptych.models.linear import Linear, unset
from triptych.models.norms import build_norm
from triptych.models.positions import grid_positions, sincos
from triptych.models.vision_config import VisionConfig


def patchify(x: torch.Tensor, patch_size: int | tuple[int, ...]) -> torch.Tensor:
    """(B, channels, *space) -> tokens (B, T, P) in raster order, P = channels times the product of the sizes.

    patch_size: along every axis, or one for each.

    Raises ValueError for a size that patch_size does not divide.
    """
    space = x.shape[2:]
    patches = patch_size if isinstance(patch_size, tuple) else (patch_size,) * len(space)
    for axis, (size, patch) in enumerate(zip(space, patches)):
        if size % patch:
            raise ValueError(
                f"an input of size {list(space)} is not divisible by model.patch_size={patch_size} "
                f"along axis {axis}; resize or crop it, or use a patch_size that divides {size}"
            )
    for axis, patch in enumerate(patches):
        # The split of an axis into (grid, patch) leaves the axes before it as they are.
        x = x.unflatten(2 + 2 * axis, (-1, patch))
    axes = range(len(space))
    x = x.permute(0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes))
    return x.flatten(1, len(space)).flatten(2)


def unpatchify(tokens_BTP: torch.Tensor, grid: tuple[int, ...], patch_size: int) -> torch.Tensor:
    """The inverse of `patchify`; grid: tokens along each axis."""
    count = len(grid)
    x = tokens_BTP.unflatten(2, (-1, *(patch_size,) * count)).unflatten(1, grid)
    order = [1 + count, *(place for axis in range(count) for place in (1 + axis, 2 + count + axis))]
    x = x.permute(0, *order)
    for axis in range(count):
        x = x.flatten(2 + axis, 3 + axis)
    return x


class PatchEmbedding(nn.Module):
    """Patches -> tokens, with their positions where those are added."""

    sequence = "enter"

    def __init__(self, config: DiffusionConfig | VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(config.in_channels * config.patch_elements, config.hidden_size)
        self.position = config.position
        self.std = config.init_std
        learned = config.position == "learned"
        self.positions = unset(config.num_tokens, config.hidden_size) if learned else None
        self._tables: dict[Any, torch.Tensor] = {}

    def init(self) -> dict[str, Init]:
        table: dict[str, Init] = {"proj.weight": Xavier(*self.proj.weight.shape), "proj.bias": ZEROS}
        return table if self.positions is None else {**table, "positions": Normal(self.std)}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * length * self.proj.weight.numel()

    def forward(
        self, tokens_BTP: torch.Tensor, grid: tuple[int, ...] | None, positions_BTA: torch.Tensor
    ) -> torch.Tensor:
        """(B, T, P) -> (B, T, C). grid: of whole images; None in packed rows, whose positions are given."""
        dtype = self.proj.weight.dtype
        x_BTC = self.proj(tokens_BTP.to(dtype)).to(dtype)
        channels = x_BTC.shape[-1]
        if self.position == "sincos" and grid is not None:
            x_BTC = x_BTC + self._table(grid, x_BTC)
        elif self.position == "sincos":
            x_BTC = x_BTC + sincos(positions_BTA, channels).to(x_BTC.dtype)
        elif self.positions is not None:
            if grid is None or math.prod(grid) != self.positions.shape[0]:
                raise ValueError(
                    f"model.position=learned knows {self.positions.shape[0]} places and the input has "
                    f"the grid {grid}; give inputs of model.input_size, or use position: rope"
                )
            x_BTC = x_BTC + self.positions
        return x_BTC

    def _table(self, grid: tuple[int, ...], x_BTC: torch.Tensor) -> torch.Tensor:
        """(1, T, C): `sincos` of a whole grid, made once.

        Kept by this module and not for the process, which may also run models on fake tensors.
        """
        key = (grid, x_BTC.device, x_BTC.dtype)
        if key not in self._tables:
            places = grid_positions(grid, x_BTC.device)
            self._tables[key] = sincos(places, x_BTC.shape[-1]).to(x_BTC.dtype)
        return self._tables[key]


class LocalConv(nn.Module):
    """x + a 3 x 3 depthwise convolution of x over the grid of tokens (DiM). weight: (C, 3, 3), bias: (C,)."""

    sequence = "whole"

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.weight = unset(config.hidden_size, 3, 3)
        self.bias = unset(config.hidden_size)

    def init(self) -> dict[str, Init]:
        return {"weight": Xavier(9, 9), "bias": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * length * self.weight.numel()

    def forward(self, x_BTC: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        image = x_BTC.transpose(1, 2).unflatten(2, grid)
        y = nn.functional.conv2d(
            image, self.weight.unsqueeze(1), self.bias, padding=1, groups=self.weight.shape[0]
        )
        return x_BTC + y.flatten(2).transpose(1, 2).to(x_BTC.dtype)


class DenoiserHead(nn.Module):
    """Norm, modulation and a linear to the patches' predicted values; zero at first."""

    sequence = "leave"

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.modulation = Modulation(config.hidden_size, 2)
        self.proj = Linear(config.hidden_size, config.predicted_channels * config.patch_elements)

    def init(self) -> dict[str, Init]:
        return {"proj.weight": ZEROS, "proj.bias": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * length * self.proj.weight.numel() + self.modulation.flops()

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, P)."""
        shift, scale = self.modulation(context)
        return self.proj(modulated(self.norm, x_BTC, shift, scale)).to(self.proj.weight.dtype)
