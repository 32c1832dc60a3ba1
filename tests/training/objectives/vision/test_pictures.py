"""Pictures of predictions: what stands where, in which colour."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.models.tasks import vision_config
from tests.training.objectives.vision.samples import objective_of, vision_batch
from triptych.training.objectives.vision.pictures import PREDICTED, TRUE, task_pictures
from triptych.training.pictures import GAP

# Images of 16 x 24 are enlarged five times.
FACTOR = 5


def drawn(batch: dict[str, Any], changes: dict[int, Any], **options: Any) -> dict[str, Any]:
    """changes: outputs by the number of the task; the others are zeros."""
    rows = len(batch["tasks"])
    shapes = [(rows, 7), (rows, 4, 4, 6), (rows, 24, 8), (rows, 2)]
    outputs = [changes.get(number, torch.zeros(shape)) for number, shape in enumerate(shapes)]
    targets = objective_of().prepare(batch, 1, training=False)[1]
    return task_pictures(vision_config(), batch["x"], outputs, targets, **options)


def has(picture: Any, colour: tuple[int, int, int]) -> bool:
    """Whether the colour is there, or a darker shade of it, as the edges of letters have."""
    ratios = picture / np.maximum(picture.max(axis=2, keepdims=True), 1)
    near = np.abs(ratios - np.array(colour) / max(colour)).max(axis=2) < 0.1
    return bool((near & (picture.max(axis=2) > 60)).any())


def test_one_picture_per_task_that_has_samples() -> None:
    pictures = drawn(vision_batch([0, 3, 3, 0]), {})
    assert set(pictures) == {"digits", "captions"}
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.shape[1] == 2 * (24 * FACTOR + GAP) + GAP
    assert drawn(vision_batch([0], valid=torch.tensor([False])), {}) == {}
    many = drawn(vision_batch([0] * 9), {}, count=5, columns=2)["digits"]
    assert many.shape[0] == 3 * (16 * FACTOR + 12 * 2 + 2 + GAP) + GAP


def test_a_wrong_class_is_told_from_a_right_one() -> None:
    batch = vision_batch([0], labels=torch.tensor([4]), x=torch.zeros(1, 1, 16, 24))
    right = drawn(batch, {0: F.one_hot(torch.tensor([4]), 7) * 9.0})["digits"]
    wrong = drawn(batch, {0: F.one_hot(torch.tensor([2]), 7) * 9.0})["digits"]
    named = drawn(batch, {0: F.one_hot(torch.tensor([2]), 7) * 9.0}, names={"digits": list("abcdefg")})
    rows = slice(GAP + 16 * FACTOR, None)
    assert has(right[rows], TRUE) and not has(right, PREDICTED)
    assert has(wrong[rows], TRUE) and has(wrong[rows], PREDICTED)
    assert not np.array_equal(named["digits"], wrong)
    # The image itself is above the text, grey as zeros are.
    assert (wrong[GAP : GAP + 16 * FACTOR, GAP : GAP + 24 * FACTOR] == 128).all()


def test_masks_stand_beside_predictions() -> None:
    masks = torch.zeros(1, 16, 24, dtype=torch.int64)
    masks[:, :8], masks[:, :, 12:] = 2, 3
    masks[:, 14:] = -1
    batch = vision_batch([1], masks=masks)
    output = F.one_hot(masks[:, ::4, ::4].clamp(min=0), 4).permute(0, 3, 1, 2) * 9.0
    picture = drawn(batch, {1: output})["shapes"][GAP:-GAP, GAP:-GAP]
    _, truth, said = np.split(picture, 3, axis=1)
    for row, column in ((3, 3), (3, 20), (10, 3), (10, 20)):
        at = (row * FACTOR + 2, column * FACTOR + 2)
        assert (truth[at] == said[at]).all()
    assert len(np.unique(truth.reshape(-1, 3), axis=0)) == 4
    assert len(np.unique(said.reshape(-1, 3), axis=0)) == 3


def test_boxes_are_drawn_where_they_are() -> None:
    boxes = torch.tensor([[[4.0, 2, 12, 10]]])
    batch = vision_batch([2], boxes=boxes, box_labels=torch.tensor([[1]]), x=torch.zeros(1, 1, 16, 24))
    # Cell 8 has its centre at (10, 6): sides of 1, 0.5, 2 and 1.5 strides.
    output = torch.full((1, 24, 8), -9.0)
    output[0, 8] = torch.tensor([-9.0, -9, 6, 1, 0.5, 2, 1.5, 6])
    output[..., 3:7] = output[..., 3:7].clamp(min=0)
    picture = drawn(batch, {2: output})["boxes"][GAP:-GAP, GAP:-GAP]
    # Both have a side there, away from their labels: left of the true box, right of the one found.
    assert tuple(picture[5 * FACTOR, 4 * FACTOR]) == TRUE
    assert tuple(picture[9 * FACTOR, 18 * FACTOR]) == PREDICTED
    assert (picture[14 * FACTOR :, : 4 * FACTOR - 1] == 128).all()
    nothing = drawn(batch, {})["boxes"]
    assert has(nothing, TRUE)


def test_odd_images_are_drawn_too() -> None:
    """Two channels, five, one that is not finite; a large one stays as large as it is."""
    for channels in (2, 5):
        config = vision_config(("digits",), in_channels=channels)
        batch = vision_batch([0], x=torch.full((1, channels, 16, 24), math.nan))
        targets = objective_of(config).prepare(batch, 1)[1]
        pictures = task_pictures(config, batch["x"], (torch.zeros(1, 7),), targets)
        assert pictures["digits"].shape[2] == 3
    config = vision_config(("digits",), input_size=[8, 160, 160])
    batch = vision_batch([0], x=torch.zeros(1, 1, 8, 160, 160))
    targets = objective_of(config).prepare(batch, 1)[1]
    video = task_pictures(config, batch["x"], (torch.zeros(1, 7),), targets)["digits"]
    assert video.shape[1] == 160 + 2 * GAP
