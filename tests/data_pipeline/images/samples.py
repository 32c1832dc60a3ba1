"""Shards for the tests of this package, written with the tarfile module alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.images.needs import ImageNeeds

Members = Mapping[str, bytes]
CLASSES = ImageNeeds(num_classes=10)


def png(values: Any, kind: str = "PNG", **options: Any) -> bytes:
    """An encoded image of uint8 values (H, W) or (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8)).save(file, format=kind, **options)
    return file.getvalue()


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def image(n: int, size: tuple[int, int] = (4, 4)) -> dict[str, bytes]:
    """Sample n: all pixels n, label n % 10."""
    return {"png": png(np.full(size, n)), "cls": str(n % 10).encode()}


def number_of(x: Any) -> np.ndarray:
    """The n of images made by `image`, from their pixels (B, C, H, W), all of which must be alike."""
    values = np.round((np.asarray(x, np.float64) + 1) * 127.5).reshape(len(x), -1)
    assert (values == values[:, :1]).all(), "the image is not of one shade"
    return values[:, 0].astype(int)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(directory: Path, samples: Sequence[Members], per_shard: int = 5, first: int = 0) -> str:
    """The samples, named 000, 001, ..., in shards of so many; the directory."""
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        part = samples[start : start + per_shard]
        write_tar(
            directory / f"part-{shard:03d}.tar",
            [
                (f"{first + start + s:03d}.{suffix}", data)
                for s, each in enumerate(part)
                for suffix, data in each.items()
            ],
        )
    return str(directory)


def config(*sources: Any, **options: Any) -> ImageDataConfig:
    """Grey 4 x 4 images unless said otherwise."""
    if not {"image_size", "buckets", "packing"} & set(options):
        options["image_size"] = 4
    return ImageDataConfig.model_validate({"sources": sources, "channels": 1, **options})
