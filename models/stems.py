"""What makes the tokens of hierarchical backbones: a convolutional stem, and the step from stage to stage.

Shape legend: B batch, T tokens in raster order, C channels of a stage, H and W of the grid.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from triptych import kernels
from triptych.models.init import ZEROS, Init, Uniform
from triptych.models.linear import Linear, unset
from triptych.models.norms import LayerNorm
from triptych.models.vision_config import VisionConfig

STRIDE = 2
STEM_STRIDE = STRIDE**2


class HalvingConv(nn.Module):
    """A 3 x 3 convolution of stride 2 over a grid. weight: (after, before, 3, 3), bias: (after,)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = unset(after, before, 3, 3)
        self.bias = unset(after)

    def init(self) -> dict[str, Init]:
        bound = 1 / math.sqrt(self.weight[0].numel())
        return {"weight": Uniform(-bound, bound), "bias": ZEROS}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, before, H, W) -> (B, H/2 * W/2, after)."""
        y = nn.functional.conv2d(image, self.weight, self.bias, stride=STRIDE, padding=1)
        return y.flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Images -> tokens of 4 x 4 pixels: convolution to C/2 channels, norm, GELU, convolution to C, norm
    (VMamba, arXiv 2401.10166)."""

    sequence = "enter"

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        if size % 2:
            raise ValueError(
                f"model.stem=conv halves model.hidden_size={size}, which is odd; use an even one"
            )
        self.conv_in = HalvingConv(config.in_channels, size // 2)
        self.norm_in = LayerNorm(size // 2, config.norm_eps)
        self.conv_out = HalvingConv(size // 2, size)
        self.norm_out = LayerNorm(size, config.norm_eps)

    def flops(self, length: int) -> int:
        """Forward FLOPs of one image of that many tokens."""
        halfway = STRIDE**2 * self.conv_in.weight.numel()
        return 2 * length * (halfway + self.conv_out.weight.numel())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, H/4 * W/4, C). Raises ValueError for a size that 4 does not divide."""
        H, W = x.shape[2:]
        if H % STEM_STRIDE or W % STEM_STRIDE:
            raise ValueError(
                f"an input of size {[H, W]} is not divisible by {STEM_STRIDE}, the pixels per token of "
                "model.stem=conv; change data or model.input_size"
            )
        dtype = self.conv_in.weight.dtype
        x_BTC = kernels.gelu(self.norm_in(self.conv_in(x.to(dtype))))
        image = x_BTC.transpose(1, 2).unflatten(2, (H // STRIDE, W // STRIDE))
        return self.norm_out(self.conv_out(image)).to(dtype)


class Downsample(nn.Module):
    """Half as many tokens along each axis, between two stages.

    conv: convolution and norm, as in VMamba. merge: norm of 2 x 2 tokens, and a linear of them (Swin, arXiv
    2103.14030); of each 2 x 2, the left column comes first.
    """

    sequence = "whole"

    def __init__(self, before: int, after: int, config: VisionConfig) -> None:
        super().__init__()
        self.linear_init = config.linear_init
        merge = config.downsample == "merge"
        self.conv = None if merge else HalvingConv(before, after)
        self.proj = Linear(STRIDE**2 * before, after, bias=False) if merge else None
        self.norm = LayerNorm(STRIDE**2 * before if merge else after, config.norm_eps)

    def init(self) -> dict[str, Init]:
        return {} if self.proj is None else {"proj.weight": self.linear_init(*self.proj.weight.shape)}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one image, of which `length` tokens are left."""
        part = self.conv if self.proj is None else self.proj
        assert part is not None, "one of the two"
        return 2 * length * part.weight.numel()

    def forward(self, x_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, H * W, before) -> (B, H/2 * W/2, after), in x's dtype. Raises ValueError for an odd grid."""
        H, W = grid
        if H % STRIDE or W % STRIDE:
            raise ValueError(
                f"model.stages halve a grid of {H} x {W} tokens, which is odd; change model.input_size (or "
                "the size of the data), or use fewer stages"
            )
        if self.conv is not None:
            image = x_BTC.transpose(1, 2).unflatten(2, (H, W))
            return self.norm(self.conv(image)).to(x_BTC.dtype)
        assert self.proj is not None, "one of the two"
        four = x_BTC.unflatten(1, (H // STRIDE, STRIDE, W // STRIDE, STRIDE)).permute(0, 1, 3, 4, 2, 5)
        return self.proj(self.norm(four.flatten(3).flatten(1, 2))).to(x_BTC.dtype)
