"""Shards of small colour images for the shrunk vision configurations (tests/vision_backbones.py): classes,
boxes, masks and embedded texts, of sizes that differ, one sample of each unreadable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.data_pipeline.images.samples import npy, png, write_shards

COUNT = 24
BROKEN = 5
"""Number of the sample whose header is whole and whose data are torn."""
SIZES = ((32, 32), (16, 24), (24, 16), (20, 28))
TEXT = (3, 6)


def write_tasks(directory: Path) -> dict[str, str]:
    """Directories by kind of task: the same images, each with its own labels."""
    draw = np.random.default_rng(0)
    samples: dict[str, list[dict[str, bytes]]] = {
        kind: [] for kind in ("classify", "detect", "segment", "contrast")
    }
    for number in range(COUNT):
        height, width = SIZES[number % len(SIZES)]
        pixels = draw.integers(0, 256, (height, width, 3))
        mask = draw.integers(0, 11, (height, width))
        mask[0] = 255
        box = {"box": [2, 3, width - 4, height - 5], "label": number % 10}
        image = png(pixels)
        image = image[:60] + bytes(len(image) - 60) if number == BROKEN else image
        labels = {
            "classify": {"cls": str(number % 10).encode()},
            # Every third image has none.
            "detect": {"boxes.json": json.dumps([box] if number % 3 else []).encode()},
            "segment": {"mask.png": png(mask)},
            "contrast": {"text.npy": npy(draw.standard_normal(TEXT).astype(np.float32))},
        }
        for kind, own in labels.items():
            samples[kind].append({"png": image, **own})
    return {kind: write_shards(directory / kind, rows, per_shard=8) for kind, rows in samples.items()}
