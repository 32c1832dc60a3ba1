"""Sets of images of one shape: an .npz as ADM writes it, a directory of PNG files, or arrays."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

# What a damaged file raises, wherever in it the damage is.
_UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)

SAMPLE_FILES = ("samples.npz", "latents.npz")
"""What `triptych sample` calls its sets."""


@dataclass(frozen=True)
class ImageSet:
    """Images that are read as they are asked for, so that a set may be larger than memory."""

    name: str
    """Where it came from, for reports."""
    count: int
    shape: tuple[int, int, int]
    """(H, W, C) of every image."""
    batches: Callable[[int], Iterator[np.ndarray]]
    """batches(size): all images in order, uint8 (<= size, H, W, C)."""
    labels: np.ndarray | None = None
    """(count,) int64, or None."""
    settings: dict[str, Any] | None = None
    """What the sampler wrote down beside the samples; None where it wrote nothing."""
    left_out: int = 0
    """Images of the source that could not be read and are not among these."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.name} holds no image")
        if self.labels is not None and self.labels.shape != (self.count,):
            raise ValueError(
                f"{self.name} has {self.count} images and labels of shape {self.labels.shape}; "
                "one label for each image is needed"
            )

    def read(self) -> np.ndarray:
        """All images at once, uint8 (count, H, W, C)."""
        return np.concatenate(list(self.batches(1024)))


def open_images(path: str | Path) -> ImageSet:
    """The images at `path`: an .npz with `arr_0` (and labels in `arr_1`), a directory of *.png, or one that
    `triptych sample` wrote, whose one PNG is a grid.

    A JSON file of the same name beside it (`samples.json` for `samples.npz`) is taken as the sampler's
    settings.
    Raises ValueError where there is no such set, or it cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        written = [path / name for name in SAMPLE_FILES if (path / name).is_file()]
        if not written:
            return _png_images(path)
        path = written[0]
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give an .npz of samples or a directory of PNG files")
    return _npz_images(path)


def array_images(images: np.ndarray, labels: np.ndarray | None = None, name: str = "arrays") -> ImageSet:
    """A set in memory: images uint8 (N, H, W, C), labels integer (N,)."""
    _check_layout(name, images.dtype, images.shape)
    return ImageSet(
        name=name,
        count=len(images),
        shape=_hwc(images.shape),
        batches=lambda size: (images[first : first + size] for first in range(0, len(images), size)),
        labels=None if labels is None else _checked_labels(name, labels),
    )


def holds_images(path: Path) -> bool:
    """Whether `path` is a directory, or an .npz with `arr_0`; False for other files, unreadable ones too."""
    if path.is_dir():
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist()
    except _UNREADABLE:
        return False


def _check_layout(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8:
        raise ValueError(f"{name} holds {dtype}; images must be uint8, 0 to 255 (latents are decoded first)")
    if len(shape) != 4 or 0 in shape[1:]:
        raise ValueError(f"{name} has the shape {shape}; images must be (N, H, W, C)")


def _hwc(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[1], shape[2], shape[3]


def _checked_labels(name: str, labels: np.ndarray) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"the labels of {name} are {labels.dtype}; they must be integers")
    return labels.astype(np.int64)


def _npz_images(path: Path) -> ImageSet:
    try:
        with _npy_stream(path, "arr_0") as (_, shape, dtype):
            pass
        labels = None
        with np.load(path, allow_pickle=False) as file:
            if "arr_1" in file:
                labels = file["arr_1"]
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an .npz of samples: {error}") from error
    _check_layout(str(path), dtype, shape)
    return ImageSet(
        name=str(path),
        count=shape[0],
        shape=_hwc(shape),
        batches=lambda size: _npz_batches(path, size),
        labels=None if labels is None else _checked_labels(str(path), labels),
        settings=read_settings(path),
    )


@contextmanager
def _npy_stream(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """An array of an .npz, opened behind its header, with its shape and dtype."""
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f"it has no array {name}")
        with archive.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            readers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in readers:
                raise ValueError(f"{name} is in version {version} of the .npy format; 1.0 and 2.0 are known")
            shape, fortran, dtype = readers[version](stream)
            if fortran:
                raise ValueError(f"{name} is stored column by column; save numpy.ascontiguousarray(images)")
            yield stream, shape, dtype


def _npz_batches(path: Path, size: int) -> Iterator[np.ndarray]:
    """`arr_0` piece by piece: fifty thousand images of 256 x 256 are 10 GB, which numpy would read whole."""
    try:
        with _npy_stream(path, "arr_0") as (stream, shape, _):
            each = shape[1] * shape[2] * shape[3]
            for first in range(0, shape[0], size):
                rows = min(size, shape[0] - first)
                data = stream.read(rows * each)
                if len(data) != rows * each:
                    raise ValueError(f"it ends in image {first + len(data) // each} of {shape[0]}")
                yield np.frombuffer(data, np.uint8).reshape(rows, *shape[1:])
            # At the end of the entry zipfile compares the checksum.
            if stream.read(1):
                raise ValueError(f"more data follows than {shape[0]} images")
    except _UNREADABLE as error:
        raise ValueError(f"{path} is damaged: {error}; write the samples again") from error


def _png_images(directory: Path) -> ImageSet:
    files = sorted(directory.glob("*.png"))
    if not files:
        raise ValueError(f"{directory} holds no *.png file")
    shape = _png(files[0]).shape
    return ImageSet(
        name=str(directory),
        count=len(files),
        shape=(shape[0], shape[1], shape[2]),
        batches=lambda size: _png_batches(files, shape, size),
        settings=read_settings(directory),
    )


def _png_batches(files: list[Path], shape: tuple[int, ...], size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(files), size):
        images = []
        for file in files[first : first + size]:
            image = _png(file)
            if image.shape != shape:
                raise ValueError(
                    f"{file} has the shape {image.shape} and {files[0].name} {shape}; "
                    "all images of a set must be alike"
                )
            images.append(image)
        yield np.stack(images)


def _png(path: Path) -> np.ndarray:
    """(H, W, 1 or 3) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "RGB", "P"):
                raise ValueError(f"its mode is {image.mode}; 8-bit grey or RGB is known")
            # A palette is a way of storing colours.
            pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def settings_path(path: Path) -> Path:
    """Where the settings of samples lie: x.json for x.npz and for a directory x."""
    return path.with_name(f"{path.name if path.is_dir() else path.stem}.json")


def read_settings(path: Path) -> dict[str, Any] | None:
    """The JSON object beside samples, or None where there is no file. Raises ValueError for anything else."""
    file = settings_path(path)
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as the settings of {path.name}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no JSON object; it should be the sampler's settings of {path.name}")
    return settings
