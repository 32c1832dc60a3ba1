"""What the commands `triptych data images`, `coco` and `masks` share: files of images, each with what is
known of it, into shards.

Files are copied as they are, not encoded again. The order within the shards is shuffled once, by a key, so
that every shard has a mixture. What cannot be used is left out, counted and named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.index import IMAGE_SUFFIXES, MAX_PIXELS, image_size
from triptych.data_pipeline.images.options import ShardOptions
from triptych.data_pipeline.images.writing import ImageManifest, Progress, SplitWriter, digest_of
from triptych.data_pipeline.order import key, permutation


@dataclass(frozen=True)
class Item:
    """One image file."""

    path: Path
    name: str
    """In messages."""
    split: str | None
    """None: by the hash of its content."""
    members: Callable[[tuple[int, int]], Mapping[str, bytes]]
    """From the image's (height, width) to the sample's other members. Raises ValueError where there are
    none."""


def write_items(
    items: Sequence[Item],
    directory: Path,
    manifest: ImageManifest,
    options: ShardOptions,
    classes: Callable[[], tuple[str, ...]],
    progress: Progress | None,
) -> None:
    """Writes the shards of all splits; classes: asked for when everything is read.

    Raises ValueError where too much is bad, or nothing is left to train on.
    """
    writers: dict[str, SplitWriter] = {}
    sizes: set[tuple[int, int]] = set()
    for done, n in enumerate(permutation(len(items), key(manifest.command)).tolist(), start=1):
        item = items[n]
        if progress:
            progress("images", done, len(items))
        try:
            data, size = _image(item.path)
            members = item.members(size)
        except ValueError as error:
            manifest.leave_out(item.name, str(error), options.max_bad_samples)
            continue
        sizes.add(size)
        split = item.split or ("valid" if _is_held_out(data, options.valid_share) else "train")
        if split not in writers:
            writers[split] = SplitWriter(directory / split, manifest.command, options.samples_per_shard)
        writers[split].write(f"{n:08d}", {item.path.suffix[1:].lower(): data, **members})
    if "train" not in writers:
        raise ValueError(
            f"none of {len(items)} images can be used for training; the first faults are: {manifest.bad[:3]}"
        )
    for split, writer in sorted(writers.items()):
        shape = next(iter(sizes)) if len(sizes) == 1 else None
        description = Description("images", 3, shape, writer.count, writer.close(), classes())
        description.write(directory / split)
        manifest.splits[split] = writer.count


def _image(path: Path) -> tuple[bytes, tuple[int, int]]:
    """An image file's bytes, height and width. Raises ValueError where it cannot serve."""
    if path.suffix[1:].lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"is none of {', '.join(IMAGE_SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"is missing ({path})")
    data = path.read_bytes()
    size = image_size(data)
    if size is None:
        raise ValueError("is no image that can be read")
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"has more than {MAX_PIXELS} pixels")
    return data, size


def _is_held_out(data: bytes, valid_share: float) -> bool:
    """Whether the hash of the content lies in the lowest share of all; copies fall on the same side."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < int(valid_share * 2**64)


def digest_of_files(root: Path, paths: Sequence[Path]) -> str:
    """Of names, sizes and times of change; a missing file has neither."""
    states = [(path, path.stat() if path.is_file() else None) for path in paths]
    return digest_of(
        [f"{path.relative_to(root)}\0" + (f"{s.st_size}\0{s.st_mtime_ns}" if s else "") for path, s in states]
    )
