"""Haar wavelet packets as one matmul over blocks of 2^levels x 2^levels tokens; saves nothing of its input.

B batch, H height, W width, C channels, S = 4^levels subbands of h x w.
"""

import functools

import torch
from torch import Tensor

from triptych.kernels.library import without_autocast


def _matrix(levels: int, like: Tensor) -> Tensor:
    """(S, S): orthonormal, from a block's tokens to its coefficients; its entries are exact in every dtype.

    Columns are numbered by the digits (row, column) of a token in each level's block, the finest first.
    """
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=like.dtype, device=like.device)
    level = torch.kron(pair, pair) / 2
    return functools.reduce(torch.kron, [level] * levels)


def _axes(levels: int) -> list[int]:
    """Dims of (B, h, 2, .. 2, w, 2, .. 2, C), twos from the coarsest to the finest, in the order
    (B, (row, column) of the finest, .. of the coarsest, h, w, C)."""
    rows = range(2, 2 + levels)
    columns = range(3 + levels, 3 + 2 * levels)
    pairs = [axis for pair in zip(reversed(rows), reversed(columns)) for axis in pair]
    return [0, *pairs, 1, 2 + levels, 3 + 2 * levels]


@without_autocast
def haar(x: Tensor, levels: int) -> Tensor:
    """(B, H, W, C) -> (B, S, h, w, C)."""
    batch, height, width, channels = x.shape
    h, w = height >> levels, width >> levels
    twos = (2,) * levels
    blocks = x.reshape(batch, h, *twos, w, *twos, channels).permute(_axes(levels))
    tokens = blocks.reshape(batch, 4**levels, h * w * channels)
    return (_matrix(levels, x) @ tokens).view(batch, 4**levels, h, w, channels)


@without_autocast
def inverse_haar(coefficients: Tensor, levels: int) -> Tensor:
    """(B, S, h, w, C) -> (B, H, W, C)."""
    batch, bands, h, w, channels = coefficients.shape
    tokens = _matrix(levels, coefficients).T @ coefficients.reshape(batch, bands, -1)
    axes = _axes(levels)
    back = [axes.index(axis) for axis in range(len(axes))]
    blocks = tokens.view(batch, *(2,) * (2 * levels), h, w, channels).permute(back)
    return blocks.reshape(batch, h << levels, w << levels, channels)
