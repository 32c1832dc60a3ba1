"""Haar wavelet packets, one level after the other, autograd by PyTorch.

B batch, H height, W width, C channels, S subbands of h x w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def haar(x: Tensor, levels: int) -> Tensor:
    """(B, H, W, C) -> (B, S, h, w, C)."""
    bands = x.unsqueeze(1).to(statistics_dtype(x))
    for _ in range(levels):
        p, q = bands[:, :, 0::2, 0::2], bands[:, :, 0::2, 1::2]
        r, s = bands[:, :, 1::2, 0::2], bands[:, :, 1::2, 1::2]
        split = [p + q + r + s, p - q + r - s, p + q - r - s, p - q - r + s]
        bands = torch.stack(split, dim=2).flatten(1, 2) / 2
    return bands.to(x.dtype)


def inverse_haar(coefficients: Tensor, levels: int) -> Tensor:
    """(B, S, h, w, C) -> (B, H, W, C)."""
    bands = coefficients.to(statistics_dtype(coefficients))
    for _ in range(levels):
        ll, lh, hl, hh = bands.unflatten(1, (-1, 4)).unbind(2)
        upper = torch.stack([ll + lh + hl + hh, ll - lh + hl - hh], dim=4)  # (B, S/4, h, w, 2, C)
        lower = torch.stack([ll + lh - hl - hh, ll - lh - hl + hh], dim=4)
        blocks = torch.stack([upper, lower], dim=3)  # (B, S/4, h, 2, w, 2, C)
        bands = blocks.flatten(4, 5).flatten(2, 3) / 2
    return bands.squeeze(1).to(coefficients.dtype)
