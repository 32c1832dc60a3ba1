"""What a shard holds and where: made once by going through the tar file, kept beside it as
`<shard>.index.npz`.

A sample is a run of members that share the name up to its first dot, as WebDataset has it; what follows the
dot is the member's suffix. The index knows each member's place, the label, and the sizes of images and
latents from their headers, so that orders, buckets and packings need no decoding. An index file is used if it
names the size and the time of change that the shard has.

S samples, M suffixes
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

log = logging.getLogger("triptych.data_pipeline.images")

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MEAN, STD, TEXT = "mean.npy", "std.npy", "text.npy"
MASK, BOXES = "mask.png", "boxes.json"
NO_LABEL, BAD_LABEL = -1, -2
UNREADABLE = -1
MAX_PIXELS = 1 << 26
"""An image with more pixels is taken for a decompression bomb."""

_VERSION = 1
_HEAD = 1 << 16  # bytes that hold the header of almost every image
_BLOCK = tarfile.BLOCKSIZE
_MAX_JSON = 1 << 20
# WebDataset's own: members under a name such as __meta__ are no samples.
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard. Sizes are 0 where there is nothing and UNREADABLE where a header is
    damaged."""

    keys: npt.NDArray[np.bytes_]  # (S,) names without suffix, UTF-8
    suffixes: tuple[str, ...]  # (M,)
    offsets: npt.NDArray[np.int64]  # (S, M) bytes from the shard's start, -1 where there is no such member
    sizes: npt.NDArray[np.int64]  # (S, M) bytes
    labels: npt.NDArray[np.int64]  # (S,) NO_LABEL, BAD_LABEL, or >= 0
    images: npt.NDArray[np.int32]  # (S, 2) height, width
    latents: npt.NDArray[np.int32]  # (S, 3) channels, height, width
    texts: npt.NDArray[np.int32]  # (S, 2) tokens, channels
    faults: tuple[str, ...]
    """What is wrong with the shard as a whole, such as a tear."""

    def __len__(self) -> int:
        return len(self.labels)


def load_index(shard: Path) -> ShardIndex:
    """The index beside the shard if it fits it, else a new one, which is then written there if it can be."""
    status = shard.stat()
    path = shard.with_name(shard.name + ".index.npz")
    found = _read(path, status)
    if found is None:
        found = build_index(shard)
        try:
            _write(path, found, status)
        except OSError as error:
            log.info("the index of %s is kept in memory only: %s", shard, error)
    return found


@dataclass
class _Sample:
    """A sample while its members come in."""

    key: str
    places: dict[str, tuple[int, int]]
    label: int = NO_LABEL
    image: tuple[int, int] = (0, 0)
    latent: tuple[int, ...] = (0, 0, 0)
    text: tuple[int, ...] = (0, 0)


def build_index(shard: Path) -> ShardIndex:
    """Goes through the tar file, reading only headers and labels; members before a tear are kept."""
    samples: list[_Sample] = []
    faults: list[str] = []
    with open(shard, "rb") as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if member.offset_data + member.size > size:
                        break
                    if member.isreg() and not member.issparse() and not _META.match(member.name):
                        _take(samples, faults, member, file)
        except tarfile.TarError as error:
            if not end:
                faults.append(f"is no tar file that can be read ({error})")
        if end and (tear := _tear(file, end, size)):
            faults.append(f"{tear}; what is whole before it is used")
    return _assemble(samples, faults)


def _tear(file: BinaryIO, end: int, size: int) -> str | None:
    """What is wrong behind the last member, where a block of zeros must be."""
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return f"is truncated at byte {size}"
    return f"is damaged at byte {end}" if block.strip(b"\0") else None


def _take(samples: list[_Sample], faults: list[str], member: tarfile.TarInfo, file: BinaryIO) -> None:
    """Adds a member to the sample it belongs to."""
    directory, _, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not dot:
        return
    key, suffix = f"{directory}/{stem}" if directory else stem, suffix.lower()
    if not samples or samples[-1].key != key:
        samples.append(_Sample(key, {}))
    sample = samples[-1]
    if suffix in sample.places:
        faults.append(f"has {member.name} twice; the first is used")
        return
    sample.places[suffix] = (member.offset_data, member.size)

    def read(limit: int) -> bytes:
        file.seek(member.offset_data)
        return file.read(min(limit, member.size))

    if suffix in ("cls", "json") and sample.label == NO_LABEL:
        sample.label = parse_label({suffix: read(_MAX_JSON)})
    elif suffix in IMAGE_SUFFIXES:
        sample.image = image_size(read(_HEAD)) or image_size(read(member.size)) or (UNREADABLE, UNREADABLE)
    elif suffix == MEAN:
        sample.latent = _array_shape(read(_HEAD), 3)
    elif suffix == TEXT:
        sample.text = _array_shape(read(_HEAD), 2)


def parse_label(members: Mapping[str, bytes]) -> int:
    """The label in `cls` or `json`, NO_LABEL if there is none, BAD_LABEL if it is no integer >= 0."""
    label: Any = NO_LABEL
    try:
        if "cls" in members:
            label = int(members["cls"].decode("ascii"))
        elif "json" in members:
            content = json.loads(members["json"])
            if not isinstance(content, dict):
                return BAD_LABEL
            if "label" not in content:
                return NO_LABEL
            label = content["label"]
        else:
            return NO_LABEL
    except (ValueError, RecursionError):
        return BAD_LABEL
    fits = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 1 << 63
    return label if fits else BAD_LABEL


def image_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an encoded image, of which the beginning may be enough; None if it says none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.height, image.width
    except Exception:  # Pillow's readers meet damaged data with errors of any kind
        return None


def _array_shape(data: bytes, dims: int) -> tuple[int, ...]:
    """Shape of an .npy file of floating-point numbers by its header; UNREADABLE where it is none of
    `dims`."""
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        header: Any = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = header[version](file)
    except (ValueError, KeyError, EOFError):
        return (UNREADABLE,) * dims
    fits = len(shape) == dims and dtype.kind == "f" and all(0 < length < 1 << 31 for length in shape)
    return tuple(shape) if fits else (UNREADABLE,) * dims


def _assemble(samples: list[_Sample], faults: list[str]) -> ShardIndex:
    suffixes = tuple(sorted({suffix for sample in samples for suffix in sample.places}))
    column = {suffix: m for m, suffix in enumerate(suffixes)}
    offsets = np.full((len(samples), len(suffixes)), -1, np.int64)
    sizes = np.zeros((len(samples), len(suffixes)), np.int64)
    for s, sample in enumerate(samples):
        for suffix, (offset, size) in sample.places.items():
            offsets[s, column[suffix]], sizes[s, column[suffix]] = offset, size
    return ShardIndex(
        keys=np.array([sample.key.encode("utf-8", "surrogateescape") for sample in samples], np.bytes_),
        suffixes=suffixes,
        offsets=offsets,
        sizes=sizes,
        labels=np.array([sample.label for sample in samples], np.int64),
        images=np.array([sample.image for sample in samples], np.int32).reshape(-1, 2),
        latents=np.array([sample.latent for sample in samples], np.int32).reshape(-1, 3),
        texts=np.array([sample.text for sample in samples], np.int32).reshape(-1, 2),
        faults=tuple(faults),
    )


_ARRAYS = ("keys", "offsets", "sizes", "labels", "images", "latents", "texts")


def _write(path: Path, index: ShardIndex, status: os.stat_result) -> None:
    head = {
        "version": _VERSION,
        "size": status.st_size,
        "changed": status.st_mtime_ns,
        "suffixes": index.suffixes,
        "faults": index.faults,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            np.savez(file, head=np.array(json.dumps(head)), **arrays)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _read(path: Path, status: os.stat_result) -> ShardIndex | None:
    """The index file's content, None if there is none that can be read and belongs to a shard of that
    status."""
    try:
        with np.load(path, allow_pickle=False) as content:
            head = json.loads(str(content["head"]))
            same = (head["version"], head["size"], head["changed"])
            if same != (_VERSION, status.st_size, status.st_mtime_ns):
                return None
            arrays = {name: content[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return ShardIndex(suffixes=tuple(head["suffixes"]), faults=tuple(head["faults"]), **arrays)
