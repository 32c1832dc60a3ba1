"""`triptych data digits`: scikit-learn's bundled handwritten digits as shards, the embedded default; as they
are, or several to an image with boxes or masks (canvas.py).

1,797 grey images of 8 x 8, 16 shades, 10 classes (UCI's optical recognition of handwritten digits, test
part). Nothing is downloaded. The split is a function of the pixels alone, and canvases keep to it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.canvas import compose, resized
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.index import BOXES, MASK
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

    single = options.task == "classify"
    counts = {"train": options.train_images, "valid": options.valid_images}
    if single:
        counts = {name: len(members) for name, members in splits.items()}

    def make(directory: Path, manifest: ImageManifest) -> None:
        done = 0
        for name, members in splits.items():
            shards = options.shards if name == "train" else -(-options.shards // 4)
            writer = SplitWriter(directory / name, "digits", -(-counts[name] // shards))
            samples = (
                _digits(images, labels, members, name, options)
                if single
                else _canvases(images[members], labels[members], name, counts[name], options)
            )
            for sample_name, sample in samples:
                writer.write(sample_name, sample)
                done += 1
                if progress:
                    progress("digits", done, sum(counts.values()))
            description = Description(
                kind="images",
                channels=1,
                size=(options.size, options.size),
                count=counts[name],
                shards=writer.close(),
                classes=(*(("background",) if options.task == "segment" else ()), *map(str, range(10))),
            )
            description.write(directory / name)
            manifest.splits[name] = counts[name]

    # Named as it always was, so that digits built by an earlier version are found.
    command = "digits" if single else f"digits --task {options.task}"
    indifferent = {"task", "train_images", "valid_images", "seed"} if single else {"task"}
    return build(command, options, indifferent, digest, make)


def _digits(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    members: npt.NDArray[np.int64],
    split_name: str,
    options: DigitsOptions,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name, members) of the digits of a split, mixed, so that any stretch of a shard has all classes."""
    for n in members[permutation(len(members), key("digits", split_name))]:
        picture = resized(_grey(images[n]), options.size)
        yield f"{n:04d}", {"png": _png(picture), "cls": str(labels[n]).encode()}


def _canvases(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    split_name: str,
    count: int,
    options: DigitsOptions,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name, members) of canvases of the digits of a split."""
    shades = _grey(images)
    for n in range(count):
        made = compose(shades, labels, options.size, options.seed, f"{options.task} {split_name}", n)
        sample = {"png": _png(made.image)}
        if options.task == "segment":
            sample[MASK] = _png(made.mask)
        else:
            pairs = zip(made.boxes.tolist(), made.labels.tolist())
            sample[BOXES] = json.dumps([{"box": box, "label": label} for box, label in pairs]).encode()
        yield f"{n:06d}", sample


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


def _grey(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Shades 0 .. 16 as 0 .. 255."""
    return np.round(image * (255 / _SHADES)).astype(np.uint8)


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
