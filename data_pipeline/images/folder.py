"""`triptych data images`: a folder with one subfolder per class, as ImageNet comes, into shards.

Files are copied as they are, not encoded again. Labels count the subfolders in order of name. The order
within the shards is shuffled once, by a key, so that every shard has a mixture of classes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.index import IMAGE_SUFFIXES, MAX_PIXELS, image_size
from triptych.data_pipeline.images.options import ImageFolderOptions
from triptych.data_pipeline.images.writing import (
    ImageManifest,
    ImageReport,
    Progress,
    SplitWriter,
    build,
    digest_of,
)
from triptych.data_pipeline.order import key, permutation

# A folder's own name for a split, and ours.
_SPLITS = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid"}


@dataclass(frozen=True)
class _File:
    path: Path
    split: str | None
    label: int


def build_image_folder(options: ImageFolderOptions, progress: Progress | None = None) -> ImageReport:
    """Builds the shards in options.out, or finds them there.

    Raises ValueError for a folder without classes or images, more than max_bad_samples files that are no
    images, or an `out` taken by something else.
    """
    root = Path(options.source)
    files, classes = _find(root)
    states = [(file.path, file.path.stat()) for file in files]
    digest = digest_of([f"{p.relative_to(root)}\0{s.st_size}\0{s.st_mtime_ns}" for p, s in states])

    def make(directory: Path, manifest: ImageManifest) -> None:
        writers: dict[str, SplitWriter] = {}
        sizes: set[tuple[int, int]] = set()
        for done, n in enumerate(permutation(len(files), key("images")).tolist(), start=1):
            file = files[n]
            data = file.path.read_bytes()
            name, size = str(file.path.relative_to(root)), image_size(data)
            if size is None or size[0] * size[1] > MAX_PIXELS:
                reason = (
                    "is no image that can be read" if size is None else f"has more than {MAX_PIXELS} pixels"
                )
                manifest.leave_out(name, reason, options.max_bad_samples)
                continue
            sizes.add(size)
            split = file.split or ("valid" if _is_held_out(data, options.valid_share) else "train")
            if split not in writers:
                writers[split] = SplitWriter(directory / split, "images", options.samples_per_shard)
            members = {file.path.suffix[1:].lower(): data, "cls": str(file.label).encode()}
            writers[split].write(f"{n:08d}", members)
            if progress:
                progress("images", done, len(files))
        if "train" not in writers:
            raise ValueError(f"source={root} has no image that can be used for training; {manifest.bad[:3]}")
        for split, writer in sorted(writers.items()):
            shape = next(iter(sizes)) if len(sizes) == 1 else None
            Description("images", 3, shape, writer.count, writer.close(), tuple(classes)).write(
                directory / split
            )
            manifest.splits[split] = writer.count

    return build("images", options, {"max_bad_samples"}, digest, make, {"source": os.path.abspath(root)})


def _find(root: Path) -> tuple[list[_File], list[str]]:
    """The image files, and the names of the classes."""
    if not root.is_dir():
        raise ValueError(f"source={root} is no directory; give a folder with one subfolder per class")
    subfolders = sorted(path.name for path in root.iterdir() if path.is_dir())
    splits: dict[str, str | None] = {"": None}
    if subfolders and all(name.lower() in _SPLITS for name in subfolders):
        splits = {name: _SPLITS[name.lower()] for name in subfolders}
        if len(set(splits.values())) < len(splits):
            raise ValueError(f"source={root} has one split twice ({', '.join(splits)}); leave one of them")
    classes = sorted({path.name for name in splits for path in (root / name).iterdir() if path.is_dir()})
    files = [
        _File(path, split, label)
        for name, split in splits.items()
        for label, class_name in enumerate(classes)
        for path in sorted((root / name / class_name).rglob("*"))
        if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not files:
        raise ValueError(
            f"source={root} holds no images in subfolders ({', '.join(IMAGE_SUFFIXES)}); it needs one "
            "subfolder per class, or train/ and valid/ with those"
        )
    return files, classes


def _is_held_out(data: bytes, valid_share: float) -> bool:
    """Whether the hash of the content lies in the lowest share of all; copies fall on the same side."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < int(valid_share * 2**64)
