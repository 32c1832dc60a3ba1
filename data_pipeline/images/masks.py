"""`triptych data masks`: images, and masks of the same name as PNG files, into shards with mask.png.

A mask holds a class id per pixel, in 8 bits, grey or palette; ids are kept, and 255 is ignored in training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from triptych.data_pipeline.images.annotated import Item, digest_of_files, write_items
from triptych.data_pipeline.images.index import IMAGE_SUFFIXES, MASK
from triptych.data_pipeline.images.options import MaskOptions
from triptych.data_pipeline.images.targets import IGNORED, mask_ids
from triptych.data_pipeline.images.writing import ImageManifest, ImageReport, Progress, build, digest_of


def build_masks(options: MaskOptions, progress: Progress | None = None) -> ImageReport:
    """Builds the shards in options.out, or finds them there.

    Raises ValueError for directories without images, more than max_bad_samples images that cannot be read or
    have no mask of their size, or an `out` taken by something else.
    """
    parts = [("train" if options.valid_images else None, Path(options.images), Path(options.masks))]
    if options.valid_images and options.valid_masks:
        parts.append(("valid", Path(options.valid_images), Path(options.valid_masks)))
    pairs = [(split, images, masks, _find(images, masks)) for split, images, masks in parts]
    digest = digest_of(
        [
            digest_of_files(images, files)
            + digest_of_files(masks, [_mask_of(images, masks, f) for f in files])
            for _, images, masks, files in pairs
        ]
    )

    def make(directory: Path, manifest: ImageManifest) -> None:
        highest = [0]
        items = [
            Item(path, str(path.relative_to(images)), split, _members(_mask_of(images, masks, path), highest))
            for split, images, masks, files in pairs
            for path in files
        ]

        def classes() -> tuple[str, ...]:
            return tuple(map(str, range(highest[0] + 1)))

        write_items(items, directory, manifest, options, classes, progress)

    names = ("images", "masks", "valid_images", "valid_masks")
    given = {name: os.path.abspath(path) for name in names if (path := getattr(options, name))}
    return build("masks", options, {"max_bad_samples"}, digest, make, given)


def _find(images: Path, masks: Path) -> list[Path]:
    """The image files."""
    for name, root in (("images", images), ("masks", masks)):
        if not root.is_dir():
            raise ValueError(f"{name}={root} is no directory")
    found = [
        path
        for path in sorted(images.rglob("*"))
        if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not found:
        raise ValueError(f"images={images} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _mask_of(images: Path, masks: Path, path: Path) -> Path:
    return masks / path.relative_to(images).with_suffix(".png")


def _members(mask: Path, highest: list[int]) -> Callable[[tuple[int, int]], Mapping[str, bytes]]:
    """highest: the highest class id of all, kept up to date as masks are read."""

    def members(size: tuple[int, int]) -> Mapping[str, bytes]:
        if not mask.is_file():
            raise ValueError(f"has no mask {mask}")
        data = mask.read_bytes()
        try:
            ids = mask_ids(data)
        except Exception as error:  # Pillow's readers meet damaged data with errors of any kind
            raise ValueError(f"has a mask that cannot be read ({type(error).__name__}: {error})") from error
        if ids.shape != size:
            raise ValueError(f"has height and width {list(size)}, and its mask {list(ids.shape)}")
        highest[0] = max(highest[0], int(ids[ids != IGNORED].max(initial=0)))
        return {MASK: data}

    return members
