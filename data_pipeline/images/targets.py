"""Masks and boxes: read from a sample's members, and brought to where the augmented image shows them.

mask.png: a class id per pixel, in an image of one channel of 8 bits, palette or grey; 255 is ignored.
boxes.json: [{"box": [x0, y0, x1, y1], "label": n}, ...] in pixels of the image, from its upper left corner.

H, W height and width, N boxes
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.augment import Box
from triptych.data_pipeline.images.index import MAX_PIXELS

IGNORED = 255
"""In mask.png: a pixel of no class that counts."""

# What is left of a box that the crop cuts: below these it is no object any more.
_LEAST_SHARE = 0.1
_LEAST_EDGE = 0.01

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def read_mask(data: bytes, image: tuple[int, int], num_classes: int) -> IntArray:
    """(H, W) of classes, -1 where they are ignored. image: (height, width) that it must have.

    Raises ValueError for another size, colours in place of ids, or an id out of range, and whatever Pillow
    makes of damaged data.
    """
    ids = mask_ids(data)
    if ids.shape != image:
        raise ValueError(f"its mask has size {list(ids.shape)} and its image {list(image)}")
    counted = ids != IGNORED
    if (wrong := ids[counted & (ids >= num_classes)]).size:
        raise ValueError(f"its mask has class {wrong[0]}, outside 0 .. {num_classes - 1}")
    return np.where(counted, ids, -1)


def mask_ids(data: bytes) -> IntArray:
    """(H, W) of a mask's values. Raises ValueError for colours, and whatever Pillow makes of damaged data."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
        if mask.width * mask.height > MAX_PIXELS:
            raise ValueError(f"its mask has {mask.width} x {mask.height} pixels, more than {MAX_PIXELS}")
        if mask.mode not in ("L", "P", "1"):
            raise ValueError(
                f"its mask has pixels of mode {mask.mode}; class ids stand in 8 bits, palette or grey"
            )
        return np.asarray(mask).astype(np.int64)


def read_boxes(data: bytes, num_classes: int) -> tuple[FloatArray, IntArray]:
    """(N, 4) boxes x0, y0, x1, y1 and their labels (N,). Raises ValueError where one is none, or has no
    class."""
    found: Any = json.loads(data)
    if not isinstance(found, list):
        raise ValueError("its boxes.json is no list of boxes")
    boxes, labels = np.zeros((len(found), 4)), np.zeros(len(found), np.int64)
    for n, each in enumerate(found):
        box, label = (each.get("box"), each.get("label")) if isinstance(each, dict) else (None, None)
        if not (isinstance(box, list) and len(box) == 4 and all(map(_finite, box))):
            raise ValueError(f"box {n} of its boxes.json is no [x0, y0, x1, y1] of finite numbers: {each}")
        if box[0] > box[2] or box[1] > box[3]:
            raise ValueError(f"box {n} of its boxes.json ends before it begins: {box}")
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
            raise ValueError(f"box {n} of its boxes.json has label {label!r}, outside 0 .. {num_classes - 1}")
        boxes[n], labels[n] = box, label
    return boxes, labels


def _finite(value: Any) -> bool:
    # The bound keeps products of coordinates finite.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < 1e9


def cut_mask(mask: IntArray, part: Box, size: tuple[int, int], *, mirror: bool) -> IntArray:
    """(H, W) of `size`: of each pixel the class where its centre lies in `part` of the mask (nearest)."""
    left, top, right, bottom = part
    rows = _nearest(top, bottom, size[0], mask.shape[0])
    columns = _nearest(left, right, size[1], mask.shape[1])
    cut = mask[np.ix_(rows, columns)]
    return np.ascontiguousarray(cut[:, ::-1] if mirror else cut)


def _nearest(start: float, stop: float, count: int, length: int) -> IntArray:
    # The 1e-9 keeps centres on the edge of two pixels on one side, whatever the rounding.
    centres = start + (np.arange(count) + 0.5) * (stop - start) / count
    return np.floor(centres + 1e-9).astype(np.int64).clip(0, length - 1)


def cut_boxes(
    boxes: FloatArray, labels: IntArray, part: Box, size: tuple[int, int], *, mirror: bool
) -> tuple[FloatArray, IntArray]:
    """The boxes where the sample of `size`, made from `part` of the image, shows them, clipped to it.

    Those of which less than a tenth of the area is left, or nothing, are left out.
    """
    left, top, right, bottom = part
    x, y = size[1] / (right - left), size[0] / (bottom - top)
    moved = (boxes - [left, top, left, top]) * [x, y, x, y]
    if mirror:
        moved = np.stack([size[1] - moved[:, 2], moved[:, 1], size[1] - moved[:, 0], moved[:, 3]], axis=1)
    clipped = moved.clip(0, [size[1], size[0], size[1], size[0]])
    edges, whole = clipped[:, 2:] - clipped[:, :2], moved[:, 2:] - moved[:, :2]
    kept = (edges >= _LEAST_EDGE).all(axis=1) & (edges.prod(axis=1) >= _LEAST_SHARE * whole.prod(axis=1))
    return clipped[kept], labels[kept]
