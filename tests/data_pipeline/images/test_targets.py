"""Masks and boxes stand where the augmented image shows what they mean; held against images themselves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.data_pipeline.images.augment import mirrored, part, pixels
from triptych.data_pipeline.images.config import AugmentConfig
from triptych.data_pipeline.images.targets import cut_boxes, cut_mask, read_boxes, read_mask

from .samples import png

RANDOM = np.random.default_rng(0)
AUGMENTS = {
    "center": AugmentConfig(),
    "flipped": AugmentConfig(flip=True),
    "random": AugmentConfig(crop="random_resized", scale=(0.3, 1.0), flip=True),
}


def seen(
    image: np.ndarray, box: list[int], size: tuple[int, int], augment: AugmentConfig, key: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What becomes of a box on a darker ground: the image (H, W), from 0 to 1, the mask, the box (N, 4)."""
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = 1
    where, mirror = part(image.shape, size, augment, key), mirrored(augment, key)
    # Shades with room on both sides, for bicubic resizing overshoots.
    grey = Image.fromarray(60 + 130 * image)
    shown = (pixels(grey, size, augment, key)[0] * 127.5 + 67.5) / 130
    mask = cut_mask(image.astype(np.int64), where, size, mirror=mirror)
    boxes, _ = cut_boxes(np.array([box], float), np.array([3]), where, size, mirror=mirror)
    return shown, mask, boxes


@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(30, 120), st.integers(30, 120)),
    size=st.sampled_from([(16, 16), (32, 24), (20, 40), (64, 64)]),
    name=st.sampled_from(list(AUGMENTS)),
    key=st.integers(0, 1000),
)
def test_every_pixel_shows_the_place_that_the_part_says(
    shape: tuple[int, int], size: tuple[int, int], name: str, key: int
) -> None:
    """Of an image whose values are a coordinate, those that are seen say where each pixel is from."""
    left, top, right, bottom = part(shape, size, AUGMENTS[name], key)
    for coordinate, low, high, count in ((1, left, right, size[1]), (0, top, bottom, size[0])):
        ramp = Image.fromarray(np.indices(shape)[coordinate].astype(np.float32) + 0.5)
        shown = (pixels(ramp, size, AUGMENTS[name], key)[0] + 1) * 127.5
        shown = shown.mean(axis=1 - coordinate)
        expected = low + (np.arange(count) + 0.5) * (high - low) / count
        if coordinate == 1 and mirrored(AUGMENTS[name], key):
            expected = expected[::-1]
        # At the ends bicubic resizing looks over the edge. Halving odd lengths puts some pixels a little off.
        step = (high - low) / count
        border = 1 + int(2 / min(step, 1))
        off = (shown - expected)[border:-border] / max(step, 1)
        assert np.abs(off).max() < 0.55 and abs(off.mean()) < 0.1


SIZES = st.tuples(st.integers(40, 150), st.integers(40, 150))


@settings(deadline=None, max_examples=150)
@given(
    shape=SIZES,
    size=st.sampled_from([(16, 16), (32, 24), (20, 40), (64, 64)]),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    edges=st.tuples(st.integers(12, 40), st.integers(12, 40)),
    name=st.sampled_from(list(AUGMENTS)),
    key=st.integers(0, 1000),
)
def test_image_mask_and_box_agree(
    shape: tuple[int, int],
    size: tuple[int, int],
    corner: tuple[float, float],
    edges: tuple[int, int],
    name: str,
    key: int,
) -> None:
    left, top = (int(place * (length - edge)) for place, length, edge in zip(corner, shape[::-1], edges))
    box = [left, top, left + edges[0], top + edges[1]]
    shown, mask, boxes = seen(np.zeros(shape, np.uint8), box, size, AUGMENTS[name], key)
    if not len(boxes):
        x0, y0, x1, y1 = part(shape, size, AUGMENTS[name], key)
        scale = size[1] / (x1 - x0) * size[0] / (y1 - y0)
        border = sum(size)
        assert mask.sum() <= 0.1 * scale * edges[0] * edges[1] + border
        return
    (x0, y0, x1, y1) = boxes[0]
    assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    # A pixel is in the mask where its centre is in the box, at the edge up to one pixel of the unscaled mask.
    where = part(shape, size, AUGMENTS[name], key)
    scale = max(size[1] / (where[2] - where[0]), size[0] / (where[3] - where[1]))
    for centres, low, high, axis in ((columns[0], x0, x1, 0), (rows[:, 0], y0, y1, 1)):
        found = np.flatnonzero(mask.any(axis=axis))
        if len(found):
            assert abs(centres[found[0]] - 0.5 - low) <= 0.5 + scale
            assert abs(centres[found[-1]] + 0.5 - high) <= 0.5 + scale
    clear = np.abs(shown - 0.5) > 0.35
    assert ((shown > 0.5) == mask)[clear].mean() > 0.95


def test_a_mask_that_keeps_its_size_is_copied_and_mirrored() -> None:
    mask = RANDOM.integers(-1, 9, (6, 10))
    whole = (0.0, 0.0, 10.0, 6.0)
    assert np.array_equal(cut_mask(mask, whole, (6, 10), mirror=False), mask)
    assert np.array_equal(cut_mask(mask, whole, (6, 10), mirror=True), mask[:, ::-1])
    assert np.array_equal(cut_mask(mask, (2.0, 1.0, 8.0, 4.0), (3, 6), mirror=False), mask[1:4, 2:8])


@pytest.mark.parametrize("times", [2, 3, 5])
def test_nearest_is_that_of_pillow(times: int) -> None:
    """Enlarged and made smaller by whole numbers, where pixels have no ties (for even ones: enlarged)."""
    mask = RANDOM.integers(0, 200, (15, 30))
    image = Image.fromarray(mask.astype(np.uint8))
    for height, width in [(15 * times, 30 * times)] + ([(15 // times, 30 // times)] if times % 2 else []):
        expected = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
        found = cut_mask(mask, (0.0, 0.0, 30.0, 15.0), (height, width), mirror=False)
        assert np.array_equal(found, expected)


def test_boxes_by_hand() -> None:
    boxes = np.array(
        [[10.0, 20, 30, 40], [0, 0, 12, 22], [-50, -50, 200, 200], [70, 70, 80, 80], [30, 30, 30, 40]]
    )
    labels = np.arange(5)
    found, kept = cut_boxes(boxes, labels, (10.0, 20.0, 50.0, 40.0), (40, 40), mirror=False)
    # x from 10 by 1, y from 20 by 2. The second keeps 2 x 2 of 12 x 22, the fourth nothing, the fifth has no
    # area.
    assert kept.tolist() == [0] and found.tolist() == [[0, 0, 20, 40]]
    found, kept = cut_boxes(boxes, labels, (0.0, 0.0, 100.0, 100.0), (50, 200), mirror=True)
    assert kept.tolist() == [0, 1, 2, 3]
    assert found.tolist() == [[140, 10, 180, 20], [176, 0, 200, 11], [0, 0, 200, 50], [40, 35, 60, 40]]
    none, kept = cut_boxes(np.zeros((0, 4)), np.zeros(0, np.int64), (0.0, 0.0, 4.0, 4.0), (8, 8), mirror=True)
    assert none.shape == (0, 4) and kept.shape == (0,)


def test_masks_are_read_as_they_are() -> None:
    ids = RANDOM.integers(0, 5, (4, 6)).astype(np.uint8)
    ids[1, 2] = 255
    expected = np.where(ids == 255, -1, ids.astype(int))
    grey = png(ids)
    palette = Image.new("P", (6, 4))
    palette.putdata(ids.ravel().tolist())
    palette.putpalette(RANDOM.integers(0, 256, 768).tolist())
    for data in (grey, _encoded(palette)):
        assert np.array_equal(read_mask(data, (4, 6), 5), expected)
    assert read_mask(_encoded(Image.fromarray(ids > 2)), (4, 6), 5).tolist() == (ids > 2).tolist()


def _encoded(image: Image.Image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (png(np.zeros((4, 5))), r"its mask has size \[4, 5\] and its image \[4, 6\]"),
        (png(np.full((4, 6), 7)), r"its mask has class 7, outside 0 .. 4"),
        (png(np.zeros((4, 6, 3))), "mode RGB; class ids stand in 8 bits"),
        (_encoded(Image.fromarray(np.full((4, 6), 900, np.uint16))), "mode I;16; class ids"),
    ],
)
def test_masks_that_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_mask(data, (4, 6), 5)


def test_boxes_are_read_as_they_are() -> None:
    found = [{"box": [1, 2.5, 3, 4], "label": 2}, {"box": [0, 0, 0, 0], "label": 0, "note": "small"}]
    boxes, labels = read_boxes(json.dumps(found).encode(), 3)
    assert boxes.tolist() == [[1, 2.5, 3, 4], [0, 0, 0, 0]] and labels.tolist() == [2, 0]
    boxes, labels = read_boxes(b"[]", 3)
    assert boxes.shape == (0, 4) and labels.shape == (0,)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({}, "no list of boxes"),
        ([3], r"box 0 of its boxes.json is no \[x0, y0, x1, y1\]"),
        ([{"box": [1, 2, 3], "label": 0}], "of finite numbers"),
        ([{"box": [1, 2, 3, float("nan")], "label": 0}], "of finite numbers"),
        ([{"box": [1, 2, 1e300, 4], "label": 0}], "of finite numbers"),
        ([{"box": [1, 2, 3, True], "label": 0}], "of finite numbers"),
        ([{"box": [3, 2, 1, 4], "label": 0}], r"box 0 of its boxes.json ends before it begins"),
        ([{"box": [1, 2, 3, 4]}], "has label None, outside 0 .. 2"),
        (
            [{"box": [1, 2, 3, 4], "label": 0}, {"box": [1, 2, 3, 4], "label": 3}],
            "box 1 .* has label 3, outside",
        ),
        ([{"box": [1, 2, 3, 4], "label": -1}], "has label -1, outside"),
        ([{"box": [1, 2, 3, 4], "label": 1.0}], "has label 1.0, outside"),
    ],
)
def test_boxes_that_are_refused(found: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_boxes(json.dumps(found).encode(), 3)
