"""Mathematics of boxes, against formulas by hand and loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from triptych.training.objectives.vision.boxes import (
    CENTER_RADIUS,
    assign,
    centerness,
    centers,
    crop,
    focal_loss,
    giou_loss,
    iou,
    nms,
)


def boxes(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 4)


def test_centers_are_in_raster_order() -> None:
    points = centers((2, 3), 4, torch.device("cpu"), torch.float64)
    assert points.tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]


def test_overlap_by_hand() -> None:
    ours = boxes((0, 0, 4, 4), (1, 1, 1, 1))
    theirs = boxes((0, 0, 4, 4), (2, 2, 6, 4), (5, 5, 6, 6), (1, 1, 1, 1))
    assert iou(ours, theirs).tolist() == [[1.0, 4 / 20, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def by_loop(all_boxes: list[list[float]], labels: list[int], grid: tuple[int, int], stride: int) -> list[int]:
    """The number of each cell's box, -1 for none."""
    found = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            best, least = -1, math.inf
            for number, (x0, y0, x1, y1) in enumerate(all_boxes):
                near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < CENTER_RADIUS * stride
                size = (x1 - x0) * (y1 - y0)
                if labels[number] >= 0 and x0 < x < x1 and y0 < y < y1 and near and size < least:
                    best, least = number, size
            found.append(best)
    return found


def test_cells_belong_to_the_smallest_box_near_whose_centre_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(6, 9, 2, generator=generator, dtype=torch.float64) * 20
    all_boxes = torch.cat([low, low + 2 + 14 * torch.rand(6, 9, 2, generator=generator)], dim=2)
    all_boxes[:, 8] = all_boxes[:, 3]
    labels = torch.randint(-1, 5, (6, 9), generator=generator)
    cell_labels, sides = assign(all_boxes, labels, (8, 10), 3)
    assert cell_labels.shape == (6, 80) and sides.shape == (6, 80, 4)
    points = centers((8, 10), 3, torch.device("cpu"), torch.float64)
    seen = 0
    for image in range(6):
        expected = by_loop(all_boxes[image].tolist(), labels[image].tolist(), (8, 10), 3)
        for cell, number in enumerate(expected):
            if number < 0:
                assert cell_labels[image, cell] == -1 and sides[image, cell].tolist() == [1, 1, 1, 1]
                continue
            seen += 1
            x0, y0, x1, y1 = all_boxes[image, number].tolist()
            x, y = points[cell].tolist()
            assert cell_labels[image, cell] == labels[image, number]
            assert sides[image, cell].tolist() == pytest.approx(
                [(x - x0) / 3, (y - y0) / 3, (x1 - x) / 3, (y1 - y) / 3]
            )
    assert seen > 50


def test_no_boxes_at_all() -> None:
    for count in (0, 2):
        labels = torch.full((1, count), -1)
        cell_labels, sides = assign(torch.zeros(1, count, 4), labels, (2, 2), 4)
        assert cell_labels.tolist() == [[-1] * 4] and torch.isfinite(sides).all()


def test_boxes_are_cropped_to_the_image_or_to_nothing() -> None:
    given = boxes(
        (-4, 2, 6, 9),
        (20, 2, 30, 9),
        (3, 3, 3, 8),
        (5, 5, 2, 8),
        (0, 0, math.nan, 4),
        (0, 0, math.inf, 4),
        (1, 1, 2, 2),
    )
    cropped, labels = crop(given, torch.tensor([0, 1, 2, 3, 4, 5, -1]), height=8, width=12)
    assert labels.tolist() == [0, -1, -1, -1, -1, -1, -1]
    assert cropped.tolist() == [[0, 2, 6, 8]] + [[0, 0, 0, 0]] * 6


def test_generalised_overlap_by_corners() -> None:
    """Against the definition of the paper on boxes by their corners."""
    generator = torch.Generator().manual_seed(1)
    ours = torch.rand(50, 4, generator=generator, dtype=torch.float64) * 3
    theirs = torch.rand(50, 4, generator=generator, dtype=torch.float64) * 3 + 0.1
    loss = giou_loss(ours, theirs)
    for a, b, value in zip(ours.tolist(), theirs.tolist(), loss.tolist(), strict=True):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = ((-s[0], -s[1], s[2], s[3]) for s in (a, b))
        both = (min(ax1, bx1) - max(ax0, bx0)) * (min(ay1, by1) - max(ay0, by0))
        either = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - both
        hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
        assert value == pytest.approx(1 - both / either + (hull - either) / hull, rel=1e-12)
    assert giou_loss(theirs, theirs).abs().max() < 1e-12
    empty = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    giou_loss(empty, theirs[:1]).sum().backward()
    assert torch.isfinite(empty.grad).all()  # type: ignore[arg-type]


def test_focal_loss_by_the_formula() -> None:
    logits = torch.linspace(-6, 6, 13, dtype=torch.float64)
    for target in (0.0, 1.0):
        for logit, value in zip(
            logits.tolist(), focal_loss(logits, torch.full_like(logits, target)).tolist(), strict=True
        ):
            p = 1 / (1 + math.exp(-logit))
            expected = -0.25 * (1 - p) ** 2 * math.log(p) if target else -0.75 * p**2 * math.log(1 - p)
            assert value == pytest.approx(expected, rel=1e-11)
    # Sure and wrong: no overflow.
    assert torch.isfinite(focal_loss(torch.tensor([-500.0, 500.0]), torch.tensor([1.0, 0.0]))).all()


def test_centerness_by_the_formula() -> None:
    sides = torch.tensor([[1.0, 1, 1, 1], [1, 2, 4, 2], [1, 1, 4, 9]], dtype=torch.float64)
    assert centerness(sides).tolist() == pytest.approx([1.0, 0.5, math.sqrt(1 / 4 * 1 / 9)])


def test_better_boxes_remove_those_of_their_class_that_overlap() -> None:
    found = boxes((0, 0, 10, 10), (0, 0, 10, 9), (0, 0, 10, 9), (0, 0, 9, 8), (20, 0, 30, 10))
    # 1 goes by 0; 2 is of another class; 3 (0.72 and 0.8) goes by 0.
    assert nms(found, torch.tensor([0, 0, 1, 0, 0]), 0.6).tolist() == [True, False, True, False, True]
    # What was removed removes nothing: 3 overlaps 0 by 0.72 only.
    assert nms(found, torch.tensor([0, 0, 1, 0, 0]), 0.75).tolist() == [True, False, True, True, True]
    assert nms(found[:0], torch.zeros(0, dtype=torch.int64), 0.5).tolist() == []
