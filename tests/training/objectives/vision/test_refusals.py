"""What the objective of several tasks refuses, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tasks import vision_config
from tests.training.objectives.vision.samples import objective_of, vision_batch
from triptych.training.objectives.config import VisionTaskConfig


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("labels", 7, r"labels of the data hold 7, .*model\.tasks\.digits\.num_classes=7 allows 0 to 6"),
        ("labels", -2, r"labels of the data hold -2"),
        ("labels_other", 8, r"labels_other of the data hold 8"),
        ("masks", 4, r"masks of the data hold 4, .*model\.tasks\.shapes\.num_classes=4"),
        ("box_labels", 3, r"box_labels of the data hold 3, .*model\.tasks\.boxes\.num_classes=3"),
        ("tasks", 4, r"task number 4 and the model has 4: digits, shapes, boxes, captions"),
        ("tasks", -1, r"task number -1"),
    ],
)
def test_numbers_out_of_range_are_named(key: str, value: int, words: str) -> None:
    batch = vision_batch()
    row = {"labels": 0, "labels_other": 0, "masks": 1, "box_labels": 2, "tasks": 3}[key]
    batch[key][row] = value
    with pytest.raises(ValueError, match=words):
        objective_of().prepare(batch, 1)
    # Of another task's samples it is no class.
    if key != "tasks":
        other = vision_batch()
        other[key][3] = value
        objective_of().prepare(other, 1)


@pytest.mark.parametrize("key", ["labels", "masks", "boxes", "box_labels", "text"])
def test_missing_labels_are_named(key: str) -> None:
    batch = vision_batch()
    del batch[key]
    with pytest.raises(ValueError, match=rf"needs {key} and the data have none"):
        objective_of().prepare(batch, 1)


def test_which_task_a_sample_is_for_may_be_left_out_with_one_task() -> None:
    batch = vision_batch([0, 0])
    del batch["tasks"]
    _, targets = objective_of(vision_config(("digits",))).prepare(batch, 1)
    assert targets["tasks"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="do not say which one a sample is for"):
        objective_of().prepare(batch, 1)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the data have 3 channels and model\.in_channels=1"):
        objective_of().prepare(vision_batch(x=torch.zeros(8, 3, 16, 24)), 1)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (
            "animals",
            {},
            r"train\.tasks\.animals is about no task of the model; model\.tasks has digits, shapes",
        ),
        ("shapes", {"label_smoothing": 0.1}, r"label_smoothing=0\.1 is for tasks of kind classify"),
        ("boxes", {"loss": "bce"}, r"loss=bce is for tasks of kind classify"),
        ("digits", {"dice": 1.0}, r"train\.tasks\.digits\.dice=1\.0 is for tasks of kind segment"),
    ],
)
def test_sections_that_fit_no_task_are_named(name: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objective_of(None, **{name: values})


def test_section_bounds() -> None:
    for values in ({"weight": -1}, {"label_smoothing": 1.0}, {"dice": -0.1}, {"loss": "mse"}, {"gamma": 2}):
        with pytest.raises(ValueError, match=next(iter(values))):
            VisionTaskConfig.model_validate(values)
