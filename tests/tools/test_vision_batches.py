"""Made-up batches of the vision family: everything a batch of the data has, in range, the same every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tasks import TASKS, vision_config
from triptych.tools.vision_batches import BOXES, packed_vision_batch, vision_batch
from triptych.training.objectives.vision.objective import NEEDED, VisionObjective

SHAPE = (1, 16, 24)


def made(tasks: tuple[str, ...], count: int = 9, seed: int = 0) -> dict[str, Any]:
    return vision_batch(
        vision_config(tasks), SHAPE, count, torch.Generator().manual_seed(seed), torch.float64
    )


@pytest.mark.parametrize("tasks", [tuple(TASKS), ("digits",), ("shapes", "boxes")], ids="+".join)
def test_batches_have_what_the_objective_asks_for(tasks: tuple[str, ...]) -> None:
    config, batch = vision_config(tasks), made(tasks)
    assert batch["x"].shape == (9, *SHAPE) and batch["x"].dtype == torch.float64
    assert batch["tasks"].tolist() == [n % len(tasks) for n in range(9)]
    assert batch["valid"].tolist() == [True] * 8 + [False]
    assert {key for task in config.tasks.values() for key in NEEDED[task.kind]} <= batch.keys()
    # prepare() refuses what is out of range; of each task there is something to learn.
    inputs, targets = VisionObjective(config, {}).prepare(batch, 1)
    assert bool((VisionObjective(config, {}).count(targets) > 0).all())
    assert not inputs["x"][-1].any(), "what could not be read is not shown"


def test_rows_have_the_labels_of_their_task_alone() -> None:
    batch = made(tuple(TASKS))
    of = {name: batch["tasks"] == number for number, name in enumerate(TASKS)}
    assert bool((batch["labels"] >= 0).eq(of["digits"]).all())
    assert bool((batch["masks"] >= 0).flatten(1).any(1).eq(of["shapes"]).all())
    there = batch["box_labels"] >= 0
    assert batch["boxes"].shape == (9, BOXES, 4) and not there[~of["boxes"]].any() and there.any()
    x0, y0, x1, y1 = batch["boxes"][there].unbind(-1)
    assert bool(((x0 >= 0) & (y0 >= 0) & (x1 <= 24) & (y1 <= 16)).all())
    assert bool((x1 - x0 >= 6).all() and (y1 - y0 >= 4).all()), "a quarter of the image each way at least"
    assert batch["text"].shape == (9, 3, 5)


def test_batches_are_a_function_of_the_generator() -> None:
    one, two, other = made(tuple(TASKS)), made(tuple(TASKS)), made(tuple(TASKS), seed=1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["x"], other["x"]) and not torch.equal(one["labels"], other["labels"])
    assert made(("digits",), count=2)["valid"].all(), "a batch of two is whole"


def test_packed_rows_have_a_label_for_each_image_that_is_there() -> None:
    config = vision_config(("digits",), position="rope", attention={"num_heads": 2, "rope_theta": 100.0})
    valid = torch.tensor([[True, True, False], [True, False, False]])
    packed = {"sizes": torch.ones(2, 3, 2, dtype=torch.int64), "valid": valid}
    batch = packed_vision_batch(packed, config, torch.Generator().manual_seed(0))
    assert bool((batch["labels"] >= 0).eq(valid).all()) and int(batch["labels"].max()) < 7
    assert batch["tasks"].tolist() == [0, 0] and batch.keys() > packed.keys()
