"""Inception-v3 (Szegedy et al., arXiv 1512.00567) under torchvision's names of parameters, for evaluation.

Defined here and not imported, because torchvision loads only beside the build of torch it was made for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 2048

# One string for each branch of a block: "name channels kernel", "," in a row and "+" side by side.
FIVES = (  # 35 x 35 pixels
    "branch1x1 64 1x1",
    "branch5x5_1 48 1x1, branch5x5_2 64 5x5",
    "branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3",
)
FIVES_TO_SEVENS = (
    "branch3x3 384 3x3",
    "branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3",
)
SEVENS = (  # 17 x 17
    "branch1x1 192 1x1",
    "branch7x7_1 {n} 1x1, branch7x7_2 {n} 1x7, branch7x7_3 192 7x1",
    "branch7x7dbl_1 {n} 1x1, branch7x7dbl_2 {n} 7x1, branch7x7dbl_3 {n} 1x7, branch7x7dbl_4 {n} 7x1, "
    "branch7x7dbl_5 192 1x7",
)
SEVENS_TO_FORKS = (
    "branch3x3_1 192 1x1, branch3x3_2 320 3x3",
    "branch7x7x3_1 192 1x1, branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3x3",
)
FORKS = (  # 8 x 8
    "branch1x1 320 1x1",
    "branch3x3_1 384 1x1, branch3x3_2a 384 1x3 + branch3x3_2b 384 3x1",
    "branch3x3dbl_1 448 1x1, branch3x3dbl_2 384 3x3, branch3x3dbl_3a 384 1x3 + branch3x3dbl_3b 384 3x1",
)

# Name, branches, n, channels of the pooled branch; None where the block halves the image.
BLOCKS: tuple[tuple[str, tuple[str, ...], int, int | None], ...] = (
    ("Mixed_5b", FIVES, 0, 32),
    ("Mixed_5c", FIVES, 0, 64),
    ("Mixed_5d", FIVES, 0, 64),
    ("Mixed_6a", FIVES_TO_SEVENS, 0, None),
    ("Mixed_6b", SEVENS, 128, 192),
    ("Mixed_6c", SEVENS, 160, 192),
    ("Mixed_6d", SEVENS, 160, 192),
    ("Mixed_6e", SEVENS, 192, 192),
    ("Mixed_7a", SEVENS_TO_FORKS, 0, None),
    ("Mixed_7b", FORKS, 0, 192),
    ("Mixed_7c", FORKS, 0, 192),
)


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, before: int, after: int, kernel: tuple[int, int], stride: int = 1, *, same: bool = False
    ) -> None:
        """same: pad so that the image keeps its size."""
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else 0
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches, and behind their channels the pooled input, through a convolution where it keeps its size."""

    def __init__(self, before: int, branches: list[str], pool: nn.Module, pooled: int | None) -> None:
        """pooled: channels of the pooled branch, or None for a block that halves the image."""
        super().__init__()
        self.pool = pool
        self.branches = []
        self.channels = before if pooled is None else pooled
        for branch in branches:
            rows = [[step.split() for step in row.split("+")] for row in branch.split(",")]
            channels = before
            for row in rows:
                halves = pooled is None and row is rows[-1]
                for name, after, kernel in row:
                    height, width = kernel.split("x")
                    convolution = Convolution(
                        channels, int(after), (int(height), int(width)), 2 if halves else 1, same=not halves
                    )
                    self.add_module(name, convolution)
                channels = sum(int(after) for _, after, _ in row)
            self.branches.append([[name for name, _, _ in row] for row in rows])
            self.channels += channels
        self.branch_pool = nn.Identity() if pooled is None else Convolution(before, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for rows in self.branches:
            y = x
            for row in rows:
                y = torch.cat([self.get_submodule(name)(y) for name in row], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


class InceptionNetwork(nn.Module):
    """x: (N, 3, 299, 299) -> pooled features (N, 2048), logits (N, classes).

    tensorflow: pool as TensorFlow's graph of 2015-12-05 does. Averages leave the padding out, the last block
    takes the maximum, and the logits have no bias, as ADM's evaluator reads them.
    """

    def __init__(self, classes: int, *, tensorflow: bool = False) -> None:
        super().__init__()
        self.tensorflow = tensorflow
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), same=True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3))
        half = nn.MaxPool2d(3, stride=2)
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=not tensorflow)
        last = nn.MaxPool2d(3, stride=1, padding=1) if tensorflow else average
        channels = 192
        for name, branches, n, pooled in BLOCKS:
            pool = half if pooled is None else last if name == "Mixed_7c" else average
            block = Mixed(channels, [branch.format(n=n) for branch in branches], pool, pooled)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name, *_ in BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight, None if self.tensorflow else self.fc.bias)
