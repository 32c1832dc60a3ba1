"""Average precision against an implementation of COCO's definition that shares nothing with ours."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from triptych.training.objectives.vision.boxes import centers
from triptych.training.objectives.vision.precision import (
    LEAST_SCORE,
    MOST_BOXES,
    Found,
    Records,
    average_precision,
    average_precisions,
    find_boxes,
)

Box = tuple[float, float, float, float]


def overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def coco(
    found: dict[int, list[tuple[float, int, Box]]], true: dict[int, list[tuple[int, Box]]], threshold: float
) -> dict[int, float]:
    """AP per class, one detection and one recall at a time.

    found: by image (score, class, box). true: by image (class, box).
    """
    precisions = {}
    for label in sorted({one for image in true.values() for one, _ in image}):
        taken: set[tuple[int, int]] = set()
        everything = [
            (score, image, place, box)
            for image, detections in found.items()
            for place, (score, one, box) in enumerate(detections)
            if one == label
        ]
        everything.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        hits = []
        for _, image, _, box in everything:
            best, which = threshold, None
            for number, (one, other) in enumerate(true.get(image, [])):
                if one == label and (image, number) not in taken and overlap(box, other) >= best:
                    best, which = overlap(box, other), number
            hits.append(which is not None)
            if which is not None:
                taken.add((image, which))
        total = sum(one == label for image in true.values() for one, _ in image)
        curve = [(sum(hits[: n + 1]) / total, sum(hits[: n + 1]) / (n + 1)) for n in range(len(hits))]
        points = []
        for hundredth in range(101):
            reached = [precision for recall, precision in curve if recall >= hundredth / 100 - 1e-12]
            points.append(max(reached, default=0.0))
        precisions[label] = sum(points) / 101
    return precisions


def random_box(draw: random.Random) -> Box:
    x, y = draw.uniform(0, 40), draw.uniform(0, 40)
    return (x, y, x + draw.uniform(8, 20), y + draw.uniform(8, 20))


def scene(seed: int, images: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """Boxes near true ones, boxes of the wrong class, missed and invented ones; equal scores, too."""
    draw = random.Random(seed)
    found: dict[int, Any] = {}
    true: dict[int, Any] = {}
    for image in range(images):
        key = image * 31 + 5
        true[key] = [(draw.randrange(4), random_box(draw)) for _ in range(draw.randrange(6))]
        detections = []
        for label, box in true[key]:
            for _ in range(draw.randrange(3)):
                moved = tuple(side + draw.gauss(0, 1.0) for side in box)
                detections.append((round(draw.random(), 1), label if draw.random() < 0.8 else 0, moved))
        detections += [(round(draw.random(), 1), draw.randrange(5), random_box(draw)) for _ in range(3)]
        found[key] = sorted(detections, key=lambda entry: -entry[0])
    return found, true


def recorded(found: dict[int, Any], true: dict[int, Any], keys: list[int]) -> Records:
    records = Records(num_classes=5)
    for key in keys:
        boxes = torch.tensor([box for *_, box in found[key]], dtype=torch.float64).view(-1, 4)
        scores = torch.tensor([score for score, *_ in found[key]], dtype=torch.float64)
        labels = torch.tensor([label for _, label, _ in found[key]], dtype=torch.int64)
        true_boxes = torch.tensor([box for _, box in true[key]], dtype=torch.float64).view(-1, 4)
        true_labels = torch.tensor([label for label, _ in true[key]], dtype=torch.int64)
        records.add(key, Found(boxes, scores, labels), true_boxes, true_labels)
    return records


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_that_of_coco(seed: int) -> None:
    found, true = scene(seed, images=12)
    values = average_precisions([recorded(found, true, list(found)).state()])
    assert values is not None
    for level, threshold in enumerate(np.linspace(0.5, 0.95, 10)):
        expected = coco(found, true, threshold)
        assert values[level].tolist() == pytest.approx(list(expected.values()), abs=1e-12)
    assert 0.05 < values.mean() < 0.95


def test_the_order_of_images_and_their_ranks_make_no_difference() -> None:
    found, true = scene(7, images=15)
    keys = list(found)
    whole = average_precisions([recorded(found, true, keys).state()])
    random.Random(0).shuffle(keys)
    parts = [recorded(found, true, keys[part::3]).state() for part in range(3)]
    empty = Records(num_classes=5).state()
    assert np.array_equal(average_precisions([parts[2], empty, parts[0], parts[1]]), whole)


def test_precision_by_hand() -> None:
    # Right, wrong, right, of 2: recall 0.5 at precision 1, recall 1 at 2/3.
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision(np.array([], dtype=bool), 3) == 0
    assert average_precision(np.array([True]), 1) == pytest.approx(1.0)
    assert average_precision(np.array([True]), 2) == pytest.approx(51 / 101)


def test_without_true_boxes_there_is_no_precision() -> None:
    records = Records(num_classes=2)
    assert average_precisions([records.state()]) is None
    none = torch.zeros(0, 4)
    nothing = Found(none, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    records.add(1, nothing, torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([1]))
    values = average_precisions([records.state()])
    assert values is not None and values.shape == (10, 1) and not values.any()


def test_a_duplicate_is_wrong() -> None:
    box = torch.tensor([[0.0, 0, 8, 8]])
    records = Records(num_classes=1)
    twice = Found(box.expand(2, -1), torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64))
    records.add(1, twice, box, torch.zeros(1, dtype=torch.int64))
    assert records.state()["right"].tolist() == [[True] * 10, [False] * 10]


# --- from outputs to boxes ---

POINTS = centers((4, 6), 4, torch.device("cpu"), torch.float32)


def output_of(cells: dict[int, tuple[int, float, tuple[float, ...]]]) -> torch.Tensor:
    """(24, 3 + 5): nothing but at these cells a class, the logit of it and of the centerness, and sides."""
    output = torch.full((24, 8), -9.0)
    output[:, 3:7] = 1.0
    for cell, (label, logit, sides) in cells.items():
        output[cell, label] = logit
        output[cell, 3:7] = torch.tensor(sides)
        output[cell, 7] = logit
    return output


def test_boxes_are_found_where_they_are_said_to_be() -> None:
    # Cell 8 is in row 1, column 2: its centre is (10, 6).
    found = find_boxes(output_of({8: (1, 2.0, (1, 0.5, 2, 1)), 23: (2, 1.0, (0.25, 0.25, 9, 9))}), POINTS, 4)
    assert found.labels.tolist() == [1, 2]
    assert found.boxes.tolist() == [[6, 4, 18, 10], [21, 13, 24, 16]]
    expected = [1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-1.0))]
    assert found.scores.tolist() == pytest.approx(expected)


def test_overlapping_boxes_of_a_class_are_one() -> None:
    same = {8: (0, 1.0, (1, 1, 1, 1)), 9: (0, 2.0, (2, 1, 0.0625, 1))}
    assert len(find_boxes(output_of(same), POINTS, 4).labels) == 1
    other = {8: (0, 1.0, (1, 1, 1, 1)), 9: (2, 2.0, (2, 1, 0.0625, 1))}
    assert find_boxes(output_of(other), POINTS, 4).labels.tolist() == [2, 0]


def test_at_most_a_hundred_boxes_and_none_that_is_not_finite() -> None:
    points = centers((16, 16), 4, torch.device("cpu"), torch.float32)
    output = torch.full((256, 7), 0.25)
    output[:, 0] = torch.linspace(-1, 1, 256)
    found = find_boxes(output, points, 4)
    assert len(found.labels) == MOST_BOXES
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert float(found.scores[0]) == pytest.approx(math.sqrt(1 / (1 + math.exp(-1)) / (1 + math.exp(-0.25))))
    assert float(found.scores.min()) > LEAST_SCORE
    output[3, 2] = math.inf
    output[4] = math.nan
    spoiled = find_boxes(output, points, 4)
    assert torch.isfinite(spoiled.boxes).all() and torch.isfinite(spoiled.scores).all()
    assert len(find_boxes(torch.full((256, 7), math.nan), points, 4).labels) == 0
