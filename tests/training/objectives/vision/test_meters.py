"""Figures of a validation against loops, and their independence of the order and the ranks of the samples."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.tasks import heads_of, vision_config
from tests.training.objectives.vision.samples import ROUND, objective_of, rows_of, run_heads, vision_batch
from tests.training.objectives.vision.test_precision import coco
from triptych.training.objectives.vision import VisionMeter
from triptych.training.objectives.vision.meters import place_of
from triptych.training.objectives.vision.precision import find_boxes

CONFIG = vision_config()


def seen(batch: dict[str, Any], outputs: tuple[Tensor, ...]) -> tuple[VisionMeter, dict[str, float]]:
    objective = objective_of()
    meter = objective.meter()
    meter.update(outputs, objective.prepare(batch, 1, training=False)[1])
    return meter, meter.merge([meter.state()])


def outputs_for(rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random outputs of the four heads, some right by chance."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, 7), (rows, 4, 4, 6), (rows, 24, 8), (rows, 2)]
    outputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    outputs[2][..., 3:7] = F.softplus(outputs[2][..., 3:7])
    outputs[3] = (outputs[3] > 0).double()
    return tuple(outputs)


def test_places_of_classes() -> None:
    logits = torch.tensor([[1.0, 3, 2], [1, 3, 2], [2, 2, 2], [2, 2, 2], [float("nan"), 1, 0]])
    assert place_of(logits, torch.tensor([1, 0, 0, 2, 1])).tolist() == [0, 2, 0, 2, 3]


def test_top_one_and_top_five() -> None:
    batch = vision_batch([0] * 40)
    batch["labels"][3] = -1
    batch["valid"][5] = False
    outputs = outputs_for(40)
    _, figures = seen(batch, outputs)
    rows = [row for row in range(40) if row not in (3, 5)]
    ranked = outputs[0].argsort(dim=1, descending=True)
    for name, count in (("top1", 1), ("top5", 5)):
        hits = [int(batch["labels"][row]) in ranked[row, :count].tolist() for row in rows]
        assert figures[f"digits/{name}"] == pytest.approx(sum(hits) / len(rows))
    assert 0 < figures["digits/top1"] < figures["digits/top5"] < 1
    # Of tasks without samples nothing is told.
    assert set(figures) == {"digits/top1", "digits/top5"}


def test_of_five_classes_the_first_five_tell_nothing() -> None:
    objective = objective_of(_five_classes())
    meter = objective.meter()
    batch = vision_batch([0, 0])
    batch["labels"], batch["labels_other"] = torch.tensor([1, 4]), torch.tensor([-1, -1])
    meter.update((torch.eye(5)[[1, 2]],), objective.prepare(batch, 1)[1])
    assert meter.merge([meter.state()]) == {"digits/top1": 0.5}


def _five_classes() -> Any:
    values = vision_config(("digits",)).model_dump(exclude_unset=True)
    return type(CONFIG).model_validate(
        {**values, "tasks": {"digits": {"kind": "classify", "num_classes": 5}}}
    )


def test_intersection_over_union_by_loops() -> None:
    batch = vision_batch([1] * 6)
    batch["masks"][batch["masks"] == 3] = 1
    batch["valid"][4] = False
    outputs = outputs_for(6)
    outputs[1][:, 3] = -99.0
    _, figures = seen(batch, outputs)
    predicted = F.interpolate(outputs[1], size=(16, 24), mode="bilinear").argmax(dim=1)
    pairs = [
        (a, b)
        for row in (0, 1, 2, 3, 5)
        for a, b in zip(
            batch["masks"][row].flatten().tolist(), predicted[row].flatten().tolist(), strict=True
        )
        if a >= 0
    ]
    unions = {k: [a == b for a, b in pairs if k in (a, b)] for k in range(4)}
    assert not unions[3]
    expected = sum(sum(hits) / len(hits) for hits in list(unions.values())[:3]) / 3
    assert figures["shapes/miou"] == pytest.approx(expected)
    assert figures["shapes/pixel_accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_precision_of_boxes_is_that_of_coco() -> None:
    """From outputs to the figure; the average itself is tested in test_precision.py."""
    batch = vision_batch([2] * 6)
    # One box goes out of the image: what is left of it counts.
    batch["boxes"][0, 0] += torch.tensor([8.0, 0, 20, 0])
    outputs = outputs_for(6)
    objective = objective_of()
    targets = objective.prepare(batch, 1)[1]
    # Right answers with a few errors, so that there is something to be measured.
    outputs[2][..., :3] = -4 + 7 * F.one_hot(targets["cell_labels"] + 1, 4)[..., 1:] + outputs[2][..., :3]
    outputs[2][..., 3:7] = targets["cell_sides"] * (0.8 + 0.2 * torch.rand(6, 24, 4, dtype=torch.float64))
    _, figures = seen(batch, outputs)
    found, true = {}, {}
    for row, key in enumerate(batch["sample_keys"].tolist()):
        boxes = find_boxes(outputs[2][row], targets["points"], 4)
        found[key] = list(
            zip(boxes.scores.tolist(), boxes.labels.tolist(), map(tuple, boxes.boxes.tolist()), strict=True)
        )
        true[key] = [
            (label, (x0, y0, min(x1, 24.0), min(y1, 16.0)))
            for label, (x0, y0, x1, y1) in zip(
                batch["box_labels"][row].tolist(), batch["boxes"][row].tolist(), strict=True
            )
            if label >= 0
        ]
    by_threshold = []
    for level in range(10):
        values = coco(found, true, 0.5 + level * 0.05)
        by_threshold.append(sum(values.values()) / len(values))
    assert figures["boxes/map50"] == pytest.approx(by_threshold[0], abs=1e-9)
    assert figures["boxes/map"] == pytest.approx(sum(by_threshold) / 10, abs=1e-9)
    assert 0.1 < figures["boxes/map"] < figures["boxes/map50"] < 1


def test_perfect_boxes_have_a_precision_of_one() -> None:
    batch = vision_batch([2] * 2)
    batch["boxes"] = torch.tensor([[[2.0, 2, 11, 11], [13, 3, 22, 14]], [[1, 1, 9, 9], [0, 0, 0, 0]]])
    batch["box_labels"] = torch.tensor([[0, 2], [1, -1]])
    targets = objective_of().prepare(batch, 1)[1]
    output = torch.cat(
        [
            -9 + 18 * F.one_hot(targets["cell_labels"] + 1, 4)[..., 1:],
            targets["cell_sides"],
            torch.full((2, 24, 1), 9.0),
        ],
        dim=2,
    )
    _, figures = seen(batch, (torch.zeros(2, 7), torch.zeros(2, 4, 4, 6), output, torch.zeros(2, 2)))
    assert figures == {"boxes/map50": 1.0, "boxes/map": 1.0}


def test_hits_of_texts() -> None:
    batch = vision_batch([3] * 10)
    batch["valid"][2] = False
    outputs = outputs_for(10)
    _, figures = seen(batch, outputs)
    assert figures == {"captions/top1": float(outputs[3][torch.arange(10) != 2, 1].mean())}
    assert 0 < figures["captions/top1"] < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_order_and_ranks_of_samples_make_no_difference(dtype: torch.dtype) -> None:
    tasks = ROUND * 3
    batch = vision_batch(tasks)
    outputs = tuple(output.to(dtype) for output in outputs_for(len(tasks)))
    _, whole = seen(batch, outputs)
    assert len(whole) == 7
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(1))
    objective = objective_of()
    states = []
    for rows in order.split(7):
        meter = objective.meter()
        for cut in rows.split(3):
            targets = objective.prepare(rows_of(batch, cut), 1, training=False)[1]
            meter.update([output[cut] for output in outputs], targets)
        states.append(pickle.loads(pickle.dumps(meter.state())))
    # A rank that saw nothing, too.
    assert objective.meter().merge([*states[::-1], objective.meter().state()]) == whole


def test_nothing_to_measure_tells_nothing() -> None:
    batch = vision_batch(masks=torch.full((8, 16, 24), -1))
    batch["labels"][:] = -1
    batch["box_labels"][:] = -1
    _, figures = seen(batch, outputs_for(8))
    assert figures == {"digits/top1": 0.0, "digits/top5": 0.0, "captions/top1": figures["captions/top1"]}
    assert seen(vision_batch(valid=torch.zeros(8, dtype=torch.bool)), outputs_for(8))[1] == {}


def test_it_reads_the_heads_own_outputs() -> None:
    """With learned variances there is one output more than tasks."""
    config = vision_config(task_weighting="uncertainty")
    objective = objective_of(config)
    inputs, targets = objective.prepare(vision_batch(), 1, training=False)
    meter = objective.meter()
    meter.update(run_heads(heads_of(config), inputs), targets)
    figures = meter.merge([meter.state()])
    assert len(figures) == 7 and all(0 <= value <= 1 for value in figures.values())
