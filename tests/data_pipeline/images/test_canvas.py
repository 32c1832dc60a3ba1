"""`triptych data digits --task detect|segment`: several digits to an image, with boxes or masks to fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits

from triptych.data_pipeline import DigitsOptions, ImageDataset, ImageNeeds, TaskNeeds, build_digits
from triptych.data_pipeline.images.canvas import Canvas, compose, resized
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.digits import split
from triptych.data_pipeline.images.shards import Shards, find_shards

from .samples import config

DIGITS = load_digits()
SHADES = np.round(DIGITS.images * (255 / 16)).astype(np.uint8)
LABELS = DIGITS.target.astype(np.int64)


def canvas(n: int, size: int = 32, seed: int = 0) -> Canvas:
    return compose(SHADES, LABELS, size, seed, "test", n)


@pytest.mark.parametrize("size", [24, 32, 64])
def test_boxes_masks_and_ink_belong_together(size: int) -> None:
    """Held against the image: all that is bright is in a box and in the mask of its digit."""
    counts = []
    for n in range(150):
        made = canvas(n, size)
        assert made.image.shape == made.mask.shape == (size, size)
        counts.append(len(made.labels))
        bright = made.image >= 64
        covered = np.zeros((size, size), int)
        for (x0, y0, x1, y1), label in zip(made.boxes, made.labels):
            assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
            covered[y0:y1, x0:x1] += 1
            inside, mask = bright[y0:y1, x0:x1], made.mask[y0:y1, x0:x1]
            assert set(np.unique(mask)) <= {0, 1 + label} and (mask[inside] == 1 + label).all()
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any(), "the box is tight"
            # An outline is convex: along a row or a column it is in one piece.
            for lines in (mask, mask.T):
                changes = (np.diff(np.pad(lines > 0, ((0, 0), (1, 1))).astype(int), axis=1) != 0).sum(axis=1)
                assert (changes <= 2).all()
        assert covered.max() <= 1, "digits do not cover each other"
        assert not made.mask[covered == 0].any() and made.image[covered == 0].max() < 64
    # A fourth often finds no place.
    assert set(counts) == {1, 2, 3, 4} and min(counts.count(k) for k in range(1, 4)) > 20


def test_digits_are_three_eighths_to_half_of_the_canvas_high() -> None:
    """Found again among the digits, enlarged: each is one of them in one of the sizes."""
    edges = []
    for n in range(20):
        made = canvas(n)
        for (x0, y0, x1, y1), label in zip(made.boxes, made.labels):
            found = [
                edge
                for edge in range(12, 17)
                for digit in SHADES[label == LABELS]
                if _shows(made.image, resized(digit, edge), (x0, y0, x1, y1))
            ]
            assert found, "the box holds no digit of that label"
            edges.append(found[0])
    assert set(edges) == {12, 13, 14, 15, 16}


def _shows(image: np.ndarray, digit: np.ndarray, box: Any) -> bool:
    ink = np.argwhere(digit >= 64)
    (top, left), (bottom, right) = ink.min(axis=0), ink.max(axis=0) + 1
    x0, y0, x1, y1 = box
    if (bottom - top, right - left) != (y1 - y0, x1 - x0):
        return False
    return np.array_equal(image[y0:y1, x0:x1].clip(24), digit[top:bottom, left:right].clip(24))


def test_a_canvas_is_a_function_of_seed_and_number() -> None:
    one, again, other, seed = canvas(5), canvas(5), canvas(6), canvas(5, seed=1)
    assert np.array_equal(one.image, again.image) and np.array_equal(one.boxes, again.boxes)
    assert not np.array_equal(one.image, other.image) and not np.array_equal(one.image, seed.image)


def test_all_digits_come_about_equally_often() -> None:
    found = np.concatenate([canvas(n).labels for n in range(600)])
    counts = np.bincount(found, minlength=10)
    assert abs(counts / counts.sum() - 0.1).max() < 0.02


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("canvas")
    for task in ("detect", "segment"):
        options = DigitsOptions(task=task, out=str(root / task), train_images=30, valid_images=12)
        report = build_digits(options)
        assert report.manifest.splits == {"train": 30, "valid": 12} and options.size == 32
        assert build_digits(options).reused
        fewer = options.model_copy(update={"train_images": 29})
        with pytest.raises(ValueError, match=r"made otherwise \(train_images: 30 -> 29\)"):
            build_digits(fewer)
    return root


def test_shards_hold_the_canvases_of_their_split(built: Path) -> None:
    parts = split(DIGITS.images.astype(np.uint8), LABELS, 0.2)
    for task in ("detect", "segment"):
        for name, members in parts.items():
            shards = Shards(find_shards(str(built / task / name)))
            assert len(shards) == (30 if name == "train" else 12)
            assert len(shards.paths) == (4 if name == "train" else 1)
            for n in range(len(shards)):
                made = compose(SHADES[members], LABELS[members], 32, 0, f"{task} {name}", n)
                found = shards.read(n)
                assert np.array_equal(_pixels(found["png"]), made.image)
                if task == "segment":
                    assert np.array_equal(_pixels(found["mask.png"]), made.mask)
                else:
                    told = json.loads(found["boxes.json"])
                    assert [each["box"] for each in told] == made.boxes.tolist()
                    assert [each["label"] for each in told] == made.labels.tolist()


def _pixels(data: bytes) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def test_no_digit_is_in_both_splits() -> None:
    parts = split(DIGITS.images.astype(np.uint8), LABELS, 0.2)
    seen = [{SHADES[n].tobytes() for n in parts[name]} for name in ("train", "valid")]
    assert not seen[0] & seen[1] and all(seen)


def test_rows_of_the_three_tasks_at_one_size(built: Path, tmp_path: Path) -> None:
    build_digits(DigitsOptions(out=str(tmp_path / "digits")))
    sources = [
        {"path": str(path / "train"), "name": name, "task": name}
        for name, path in (
            ("digits", tmp_path / "digits"),
            ("boxes", built / "detect"),
            ("shapes", built / "segment"),
        )
    ]
    tasks = {
        "digits": TaskNeeds("classify", 0, 10),
        "boxes": TaskNeeds("detect", 1, 10),
        "shapes": TaskNeeds("segment", 2, 11),
    }
    needs = ImageNeeds(channels=1, size=(32, 32), patch_size=4, tasks=tasks)
    data = ImageDataset(config(*sources, image_size=32), 0, needs)
    rows = [data.sample(i) for i in range(90)]
    assert all(row["valid"] and row["x"].shape == (1, 32, 32) for row in rows) and not len(data.bad)
    assert [sum(row["tasks"] == n for row in rows) for n in range(3)] == [30, 30, 30]
    for row in rows:
        assert (
            (row["labels"] >= 0)
            == (row["tasks"] == 0)
            == (not (row["masks"] >= 0).any() and row["tasks"] == 0)
        )
        assert (row["box_labels"] >= 0).sum() in (range(1, 5) if row["tasks"] == 1 else [0])
    assert Description.read(built / "segment" / "valid").classes == ("background", *"0123456789")
    assert Description.read(built / "detect" / "valid").classes == tuple("0123456789")


def test_options_by_task() -> None:
    assert DigitsOptions().out == "data/digits" and DigitsOptions().size == 8
    found = DigitsOptions.model_validate({"task": "segment"})
    assert found.out == "data/digits-segment" and found.size == 32
    assert DigitsOptions.model_validate({"task": "detect", "size": 64, "out": "o"}).size == 64
    with pytest.raises(ValidationError, match="size=16 has no room for several digits; use at least 24"):
        DigitsOptions(task="detect", size=16)


def test_one_task_does_not_pass_for_another(built: Path) -> None:
    with pytest.raises(ValueError, match=r"command: digits --task detect -> digits --task segment"):
        build_digits(
            DigitsOptions(task="segment", out=str(built / "detect"), train_images=30, valid_images=12)
        )
    with pytest.raises(ValueError, match=r"command: digits --task detect -> digits\)"):
        build_digits(DigitsOptions(size=32, out=str(built / "detect")))
