"""`triptych data digits`: scikit-learn's bundled handwritten digits as shards, the embedded default.

1,797 grey images of 8 x 8, 16 shades, 10 classes (UCI's optical recognition of handwritten digits, test
part). Nothing is downloaded. The split is a function of the pixels alone.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.options import DigitsOptions
from triptych.data_pipeline.images.writing import ImageManifest, ImageReport, Progress, SplitWriter, build
from triptych.data_pipeline.order import key, permutation

_SHADES = 16


def build_digits(options: DigitsOptions, progress: Progress | None = None) -> ImageReport:
    """Builds the shards in options.out, or finds them there.

    Raises RuntimeError without scikit-learn, ValueError if `out` is taken by something else.
    """
    images, labels = _load()
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    splits = split(images, labels, options.valid_share)

    def make(directory: Path, manifest: ImageManifest) -> None:
        done = 0
        for name, members in splits.items():
            shards = options.shards if name == "train" else -(-options.shards // 4)
            writer = SplitWriter(directory / name, "digits", -(-len(members) // shards))
            # Mixed, so that any stretch of a shard has all classes.
            for n in members[permutation(len(members), key("digits", name))]:
                image = {"png": _png(images[n], options.size), "cls": str(labels[n]).encode()}
                writer.write(f"{n:04d}", image)
                done += 1
                if progress:
                    progress("digits", done, len(images))
            description = Description(
                kind="images",
                channels=1,
                size=(options.size, options.size),
                count=len(members),
                shards=writer.close(),
                classes=tuple(str(digit) for digit in range(10)),
            )
            description.write(directory / name)
            manifest.splits[name] = len(members)

    return build("digits", options, set(), digest, make)


def _load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(1797, 8, 8) shades 0 .. 16, and the digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(
            "the digits come with scikit-learn, which is not installed; pip install scikit-learn"
        ) from error
    found: Any = load_digits()
    return found.images.astype(np.uint8), found.target.astype(np.int64)


def split(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], valid_share: float
) -> dict[str, npt.NDArray[np.int64]]:
    """Indices of train and valid: of each class, the lowest share by the hash of its pixels is held out.

    Images alike in every pixel fall on the same side.
    """
    hashes = np.array([int(hashlib.sha256(image.tobytes()).hexdigest()[:15], 16) for image in images])
    held_out = np.zeros(len(images), np.bool_)
    for label in np.unique(labels):
        of_class = np.sort(hashes[labels == label])
        bound = of_class[max(1, round(valid_share * len(of_class))) - 1]
        held_out |= (labels == label) & (hashes <= bound)
    return {"train": np.flatnonzero(~held_out), "valid": np.flatnonzero(held_out)}


def _png(image: npt.NDArray[np.uint8], size: int) -> bytes:
    from PIL import Image

    picture = Image.fromarray(np.round(image * (255 / _SHADES)).astype(np.uint8))
    if size != picture.width:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
