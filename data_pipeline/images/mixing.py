"""Mixup and CutMix: a sample and another of its source become one, by draws keyed by the first.

x: (C, H, W) float32; share: of the first sample in what is seen.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.config import AugmentConfig
from triptych.data_pipeline.images.draws import beta, uniforms

Pixels = npt.NDArray[np.float32]


def partner_of(sample: int, count: int, sample_key: int) -> int | None:
    """Another of a source's `count` samples, each as likely; None where there is no other."""
    if count < 2:
        return None
    return (sample + 1 + int(uniforms(sample_key, "partner", 1)[0] * (count - 1))) % count


def mix(first: Pixels, other: Pixels, augment: AugmentConfig, sample_key: int) -> tuple[Pixels, float]:
    """The mixture, by augment.mixup or cutmix (of both one, drawn evenly), and the share of the first."""
    if augment.cutmix and (not augment.mixup or uniforms(sample_key, "mix", 1)[0] < 0.5):
        return cutmix(first, other, beta(sample_key, "cutmix", augment.cutmix), sample_key)
    share = beta(sample_key, "mixup", augment.mixup)
    return np.float32(share) * first + np.float32(1 - share) * other, share


def cutmix(first: Pixels, other: Pixels, share: float, sample_key: int) -> tuple[Pixels, float]:
    """A box of 1 - share of the area, of the image's aspect, about a centre drawn evenly, taken from `other`.

    The share returned is that of the pixels, for the box is cut off at the image's edges (arXiv 1905.04899).
    """
    height, width = first.shape[1:]
    edge = math.sqrt(1 - share)
    y, x = uniforms(sample_key, "cutmix box", 2)
    top, bottom = _side(y * height, edge * height, height)
    left, right = _side(x * width, edge * width, width)
    mixed = first.copy()
    mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _side(centre: float, edge: float, length: int) -> tuple[int, int]:
    return max(0, round(centre - edge / 2)), min(length, round(centre + edge / 2))
