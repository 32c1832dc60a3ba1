"""How the norms see their inputs: lines of channels, in groups that share a weight and a bias.

A line is what one mean and one root mean square are taken over. Line i of group o lies at number
o * lines + i among all lines, or, interleaved, at i * groups + o.

    rms_norm of K groups of channels      a group per K, interleaved
    layer_norm                            one group
    modulation (B, 1, C) of x (B, T, C)   a group per row
    modulation (1, T, C)                  a group per token of a row, interleaved
    modulation (B, T, C)                  one group whose lines have weights of their own (`per_line`)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from triptych.kernels import triton_launch

MAX_CHANNELS = 65536
"""The longest line that a program can hold."""
_TILE = 2048
"""Elements of a tile of several lines."""
_ELEMENTS_PER_WARP = 256
"""8 elements per thread and input, in bf16 a load of 16 bytes: few registers, so that many threads work."""
_WARPS = 132 * 32
"""Warps of all programs that add up gradients of weights: 32 per multiprocessor of an H100. As a warp has 256
elements, the buffer of their sums has about a million, up to 8,192 channels."""
_TILES_PER_PROGRAM = 8
"""Each of them has so many tiles at least, else partial sums would be as large as what they are sums of."""


class Lines(NamedTuple):
    """The lines of an input and the weights that belong to them."""

    groups: int
    lines: int
    """Lines of each group."""
    channels: int
    interleaved: bool = False
    per_line: bool = False

    @property
    def total(self) -> int:
        """All lines."""
        return self.groups * self.lines


class Tile(NamedTuple):
    """What a program holds at once."""

    rows: int
    block: int
    warps: int


def too_long(channels: int) -> str | None:
    """Why lines of so many channels have no Triton form; None where they do."""
    return None if channels <= MAX_CHANNELS else f"lines of {channels} channels, more than {MAX_CHANNELS}"


def tile(lines: Lines) -> Tile:
    """Whole lines, several where they are short."""
    block = triton_launch.power_of_2(lines.channels)
    rows = min(max(1, _TILE // block), triton_launch.power_of_2(lines.lines, at_least=1))
    return Tile(rows, block, min(32, max(1, rows * block // _ELEMENTS_PER_WARP)))


def splits(lines: Lines) -> int:
    """Programs that share the lines of one group where these are added up."""
    rows, _, warps = tile(lines)
    tiles = math.ceil(lines.lines / rows)
    return max(1, min(_WARPS // warps // lines.groups, math.ceil(tiles / _TILES_PER_PROGRAM)))


def modulated_lines(x: torch.Size, modulation: torch.Size) -> Lines | None:
    """Lines of x (..., C) under a modulation of as many dims, each 1 or x's; None where its dims between the
    first and the last are neither all 1 nor all x's."""
    channels, rows, length = x[-1], math.prod(x[:1] if len(x) > 1 else ()), math.prod(x[1:-1])
    per_row = len(x) > 1 and modulation[0] == x[0] != 1
    per_token = modulation[1:-1] == x[1:-1] and length > 1
    if not per_token and math.prod(modulation[1:-1]) != 1:
        return None
    if per_token and (per_row or rows == 1):
        return Lines(1, rows * length, channels, per_line=True)
    if per_token:
        return Lines(length, rows, channels, interleaved=True)
    return Lines(rows, length, channels) if per_row else Lines(1, rows * length, channels)
