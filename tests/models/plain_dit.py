"""A DiT in plain PyTorch after the formulas of its paper (arXiv 2212.09748), with the weights of one of ours.

Nothing of triptych's is called here: patches are taken by a convolution, queries, keys and values come from
one linear, the sines of the positions are written out place by place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, size: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)
        self.fc1 = nn.Linear(size, mlp)
        self.fc2 = nn.Linear(mlp, size)
        self.adaln = nn.Linear(size, 6 * size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(F.silu(c))[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attend(norm(x) * (1 + scale_a) + shift_a)
        inner = norm(x) * (1 + scale_m) + shift_m
        return x + gate_m * self.fc2(F.gelu(self.fc1(inner), approximate="tanh"))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PlainDiT(nn.Module):
    def __init__(
        self, space: tuple[int, int], patch: int, channels: tuple[int, int],
        size: int, depth: int, heads: int, mlp: int,
        classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.out_channels = patch, channels[1]
        self.grid = (space[0] // patch, space[1] // patch)
        self.patches = nn.Conv2d(channels[0], size, patch, stride=patch)
        self.time1, self.time2 = nn.Linear(256, size), nn.Linear(size, size)
        self.labels = nn.Embedding(classes + 1, size)
        self.blocks = nn.ModuleList(PlainBlock(size, heads, mlp) for _ in range(depth))
        self.final_adaln = nn.Linear(size, 2 * size)
        self.final = nn.Linear(size, patch * patch * channels[1])
        self.register_buffer("table", position_table(self.grid, size))

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.table
        c = self.time2(F.silu(self.time1(time_features(times)))) + self.labels(labels)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_adaln(F.silu(c))[:, None].chunk(2, dim=-1)
        tokens = self.final(norm(tokens) * (1 + scale) + shift)
        rows, columns = self.grid
        # The paper's code has a patch's values as (row, column, channel).
        image = tokens.reshape(-1, rows, columns, self.patch, self.patch, self.out_channels)
        image = torch.einsum("nhwpqc->nchpwq", image)
        return image.reshape(-1, self.out_channels, rows * self.patch, columns * self.patch)

    @torch.no_grad()
    def take(self, ours: Mapping[str, Tensor]) -> None:
        """Copy the parameters of a DiffusionModel, by their names."""
        for name, parameter in self.named_parameters():
            parameter.copy_(translated(name, ours, self.patch).reshape(parameter.shape))


def translated(name: str, ours: Mapping[str, Tensor], patch: int) -> Tensor:
    """What our tensors of parameters, or of their gradients, are in the layout of PlainDiT's parameter."""
    last = name.rsplit(".", 1)[-1]
    if name.startswith("blocks."):
        _, layer, part, _ = name.split(".")
        names = {
            "qkv": ["mixer.q_proj", "mixer.k_proj", "mixer.v_proj"],
            "proj": ["mixer.o_proj"],
            "fc1": ["ffn.up_proj"],
            "fc2": ["ffn.down_proj"],
            "adaln": ["modulation.proj"],
        }[part]
        return torch.cat([ours[f"blocks.{layer}.{found}.{last}"] for found in names])
    found = ours[{
        "patches": f"patch_embedding.proj.{last}",
        "time1": f"time_embedding.up.{last}",
        "time2": f"time_embedding.down.{last}",
        "labels": "label_embedding.weight",
        "final_adaln": f"head.modulation.proj.{last}",
        "final": f"head.proj.{last}",
    }[name.split(".")[0]]]  # fmt: skip
    if name.startswith("final."):
        # Ours has a patch's values as (channel, row, column).
        return found.unflatten(0, (-1, patch * patch)).transpose(0, 1).flatten(0, 1)
    return found


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def time_features(times: Tensor) -> Tensor:
    frequencies = torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=times.dtype)
    angles = times[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(grid: tuple[int, int], size: int) -> Tensor:
    """(1, T, size): of a token in row r and column c, size/4 sines and cosines each of c, then of r."""
    tokens = [
        list(_sines(c, size // 2)) + list(_sines(r, size // 2))
        for r in range(grid[0])
        for c in range(grid[1])
    ]
    return torch.tensor([tokens], dtype=torch.float64)


def _sines(place: int, size: int) -> Iterator[float]:
    for function in (math.sin, math.cos):
        for k in range(size // 2):
            yield function(place / 10000 ** (2 * k / size))
