"""Shards of random samples for the shrunk backbones (tests/backbones.py), one sample of each unreadable."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data_pipeline.images.samples import npy, png, write_shards

COUNT = 24
BROKEN = 5
"""Number of the sample whose header is whole and whose data are torn."""
ASPECTS = ((8, 8), (4, 12), (8, 4), (2, 6))
"""Sizes of latents, whose tokens are patches of 2 x 2."""
TEXT = (3, 6)


def write_latents(directory: Path, sizes: tuple[tuple[int, int], ...] = ((8, 8),)) -> str:
    """Means and standard deviations of 4 channels, a label, and an embedded text for each."""
    draw = np.random.default_rng(0)
    samples = []
    for number in range(COUNT):
        shape = (4, *sizes[number % len(sizes)])
        mean = npy(draw.standard_normal(shape).astype(np.float32))
        samples.append(
            {
                "mean.npy": mean[:-9] if number == BROKEN else mean,
                "std.npy": npy(np.full(shape, 0.1, np.float32)),
                "cls": str(number % 10).encode(),
                "text.npy": npy(draw.standard_normal(TEXT).astype(np.float32)),
            }
        )
    return write_shards(directory, samples, per_shard=8)


def write_images(directory: Path) -> str:
    """Grey 8 x 8 images of noise, each with a label."""
    draw = np.random.default_rng(0)
    samples = []
    for number in range(COUNT):
        image = png(draw.integers(0, 256, (8, 8)))
        # Behind the header the compressed pixels end too early.
        broken = image[:60] + bytes(len(image) - 60)
        samples.append({"png": broken if number == BROKEN else image, "cls": str(number % 10).encode()})
    return write_shards(directory, samples, per_shard=8)
