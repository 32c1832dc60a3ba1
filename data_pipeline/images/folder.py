"""`triptych data images`: a folder with one subfolder per class, as ImageNet comes, into shards.

Labels count the subfolders in order of name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from triptych.data_pipeline.images.annotated import Item, digest_of_files, write_items
from triptych.data_pipeline.images.index import IMAGE_SUFFIXES
from triptych.data_pipeline.images.options import ImageFolderOptions
from triptych.data_pipeline.images.writing import ImageManifest, ImageReport, Progress, build

# A folder's own name for a split, and ours.
_SPLITS = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid"}


def build_image_folder(options: ImageFolderOptions, progress: Progress | None = None) -> ImageReport:
    """Builds the shards in options.out, or finds them there.

    Raises ValueError for a folder without classes or images, more than max_bad_samples files that are no
    images, or an `out` taken by something else.
    """
    root = Path(options.source)
    items, classes = _find(root)
    digest = digest_of_files(root, [item.path for item in items])

    def make(directory: Path, manifest: ImageManifest) -> None:
        write_items(items, directory, manifest, options, lambda: classes, progress)

    return build("images", options, {"max_bad_samples"}, digest, make, {"source": os.path.abspath(root)})


def _find(root: Path) -> tuple[list[Item], tuple[str, ...]]:
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
    items = [
        Item(path, str(path.relative_to(root)), split, _label(label))
        for name, split in splits.items()
        for label, class_name in enumerate(classes)
        for path in sorted((root / name / class_name).rglob("*"))
        if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not items:
        raise ValueError(
            f"source={root} holds no images in subfolders ({', '.join(IMAGE_SUFFIXES)}); it needs one "
            "subfolder per class, or train/ and valid/ with those"
        )
    return items, tuple(classes)


def _label(label: int) -> Callable[[tuple[int, int]], Mapping[str, bytes]]:
    return lambda size: {"cls": str(label).encode()}
