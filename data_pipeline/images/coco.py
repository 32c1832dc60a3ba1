"""`triptych data coco`: images and an instances JSON of COCO's format into shards with boxes.json.

Categories are numbered from 0 in order of their ids. Boxes, there x, y, width and height, become corners and
are clipped to the image; those outside it or of no area are left out and counted, and so are crowds. An image
without a box is a sample too.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.data_pipeline.images.annotated import Item, digest_of_files, write_items
from triptych.data_pipeline.images.index import BOXES
from triptych.data_pipeline.images.options import CocoOptions
from triptych.data_pipeline.images.writing import ImageManifest, ImageReport, Progress, build, digest_of
from triptych.data_pipeline.manifest import file_digest

_CROWD = "boxes of crowds"
_OUTSIDE = "boxes outside their image or of no area"
_BROKEN = "boxes that are no four finite numbers"


def build_coco(options: CocoOptions, progress: Progress | None = None) -> ImageReport:
    """Builds the shards in options.out, or finds them there.

    Raises ValueError for a file that is not of COCO's format, splits of unlike categories, more than
    max_bad_samples images that are missing or cannot be read, or an `out` taken by something else.
    """
    parts = [("train" if options.valid_images else None, Path(options.images), Path(options.annotations))]
    if options.valid_images and options.valid_annotations:
        parts.append(("valid", Path(options.valid_images), Path(options.valid_annotations)))
    read = [(split, root, _Annotations.read(path, root)) for split, root, path in parts]
    first = read[0][2]
    for _, _, other in read[1:]:
        if other.categories != first.categories:
            raise ValueError(
                f"{other.path} has other categories than {first.path}; a model's labels must mean one thing"
            )
    digest = digest_of(
        [digest_of_files(root, each.files(root)) + file_digest(each.path) for _, root, each in read]
    )

    def make(directory: Path, manifest: ImageManifest) -> None:
        dropped: Counter[str] = Counter()
        items = [item for split, root, each in read for item in each.items(root, split, dropped)]
        names = tuple(first.categories.values())
        write_items(items, directory, manifest, options, lambda: names, progress)
        manifest.dropped = dict(sorted(dropped.items()))

    paths = ("images", "annotations", "valid_images", "valid_annotations")
    given = {name: os.path.abspath(path) for name in paths if (path := getattr(options, name))}
    return build("coco", options, {"max_bad_samples"}, digest, make, given)


@dataclass(frozen=True)
class _Annotations:
    """What a file says, checked as far as everything rests on it."""

    path: Path
    images: list[dict[str, Any]]
    boxes: dict[Any, list[dict[str, Any]]]
    """By the image's id."""
    categories: dict[int, str]
    """Names by id, in the order of ids."""

    @classmethod
    def read(cls, path: Path, root: Path) -> _Annotations:
        """Raises ValueError for what is no such file, and for a root that is no directory."""
        if not root.is_dir():
            raise ValueError(f"images={root} is no directory; give the one that holds the image files")
        try:
            found: Any = json.loads(path.read_bytes())
            categories = {int(each["id"]): str(each["name"]) for each in found["categories"]}
            twice = len(categories) != len(found["categories"])
            images = sorted(found["images"], key=lambda each: str(each["file_name"]))
            boxes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for each in found["annotations"]:
                if each["category_id"] not in categories:
                    raise ValueError(f"category_id={each['category_id']} is none of its categories")
                boxes[each["image_id"]].append(each)
            ids = {each["id"] for each in images}
        except (OSError, ValueError, KeyError, TypeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"annotations={path} cannot be read as COCO's instances ({told}); it needs images (id, "
                "file_name), categories (id, name) and annotations (image_id, category_id, bbox)"
            ) from error
        if not categories or not images or twice or len(ids) != len(images):
            raise ValueError(
                f"annotations={path} lists no images, no categories, or an id of those twice; mend it"
            )
        if unknown := set(boxes) - ids:
            raise ValueError(
                f"annotations={path} has boxes of image {sorted(map(str, unknown))[0]}, which its images do "
                "not list; mend it"
            )
        return cls(path, images, boxes, dict(sorted(categories.items())))

    def files(self, root: Path) -> list[Path]:
        """The image files."""
        return [root / each["file_name"] for each in self.images]

    def items(self, root: Path, split: str | None, dropped: Counter[str]) -> list[Item]:
        """The images with their boxes; what is left out of them is counted in `dropped` as they are read."""
        return [
            Item(root / each["file_name"], each["file_name"], split, self._members(each, dropped))
            for each in self.images
        ]

    def _members(
        self, image: dict[str, Any], dropped: Counter[str]
    ) -> Callable[[tuple[int, int]], Mapping[str, bytes]]:
        def members(size: tuple[int, int]) -> Mapping[str, bytes]:
            told = (image.get("height", size[0]), image.get("width", size[1]))
            if told != size:
                raise ValueError(f"has height and width {list(size)}, and by {self.path.name} {list(told)}")
            labels = {category: label for label, category in enumerate(self.categories)}
            kept = []
            for each in self.boxes.get(image["id"], []):
                box, reason = _corners(each, size)
                if box is None:
                    dropped[reason] += 1
                else:
                    kept.append({"box": box, "label": labels[each["category_id"]]})
            return {BOXES: json.dumps(kept).encode()}

        return members


def _corners(annotation: dict[str, Any], size: tuple[int, int]) -> tuple[list[float] | None, str]:
    """The box clipped to an image of (height, width), or None and why it is left out."""
    if annotation.get("iscrowd"):
        return None, _CROWD
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4):
        return None, _BROKEN
    if not all(isinstance(each, int | float) and math.isfinite(each) for each in box):
        return None, _BROKEN
    x, y, width, height = box
    height_of_image, width_of_image = size
    left, right = max(0, x), min(width_of_image, x + width)
    top, bottom = max(0, y), min(height_of_image, y + height)
    if right <= left or bottom <= top:
        return None, _OUTSIDE
    return [left, top, right, bottom], ""
