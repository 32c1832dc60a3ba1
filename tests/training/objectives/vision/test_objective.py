"""Losses of several tasks against formulas and loops, in fp64; cuts of the batch; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.tasks import heads_of, staged_config, vision_config
from tests.training.objectives.vision.samples import (
    ROUND,
    objective_of,
    rows_of,
    run_heads,
    vision_batch,
)
from triptych.models.vision_config import VisionConfig
from triptych.training.objectives.vision import VisionObjective
from triptych.training.objectives.vision.boxes import giou_loss
from triptych.training.objectives.vision.losses import dice_loss

NAMES = ("digits", "shapes", "boxes", "captions")


def random(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def only(
    name: str, batch: dict[str, Any], output: Tensor, **section: Any
) -> tuple[float, int, dict[str, Tensor]]:
    """Sum and count of a model with this task alone, and the targets."""
    config = vision_config((name,))
    objective = objective_of(config, **{name: section})
    _, targets = objective.prepare({**batch, "tasks": torch.zeros_like(batch["tasks"])}, 1)
    sums, counts, metrics = objective.loss((output,), targets)
    assert sums.dtype == torch.float64 and float(metrics[f"{name}/loss"]) == float(sums[0])
    assert torch.equal(counts, objective.count(targets))
    return float(sums[0]), int(counts[0]), targets


# --- each kind of task ---


def mixture(batch: dict[str, Any], row: int, smoothing: float) -> list[float]:
    wanted = [smoothing / 7] * 7
    label, other = int(batch["labels"][row]), int(batch["labels_other"][row])
    share = float(batch["share"][row])
    wanted[label] += (1 - smoothing) * share
    wanted[other if other >= 0 else label] += (1 - smoothing) * (1 - share)
    return wanted


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classification_by_the_formula(loss: str, smoothing: float) -> None:
    batch = vision_batch([0] * 6)
    batch["labels"][4] = -1
    batch["labels_other"][1] = -1
    batch["valid"][2] = False
    logits = random(6, 7)
    total, count, _ = only("digits", batch, logits, loss=loss, label_smoothing=smoothing)
    expected = 0.0
    for row in (0, 1, 3, 5):
        wanted = mixture(batch, row, smoothing)
        exps = [math.exp(value) for value in logits[row].tolist()]
        if loss == "ce":
            expected -= sum(q * math.log(e / sum(exps)) for q, e in zip(wanted, exps, strict=True))
        else:
            expected -= sum(
                q * math.log(e / (1 + e)) + (1 - q) * math.log(1 / (1 + e))
                for q, e in zip(wanted, exps, strict=True)
            )
    assert (total, count) == (pytest.approx(expected, rel=1e-7), 4)


def test_classification_without_mixing_is_pytorchs() -> None:
    batch = vision_batch([0] * 5)
    del batch["labels_other"], batch["share"]
    logits = random(5, 7)
    total, _, _ = only("digits", batch, logits, label_smoothing=0.2)
    expected = F.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=0.2)
    assert total == pytest.approx(float(expected), rel=1e-12)


def test_segmentation_by_the_formula() -> None:
    batch = vision_batch([1] * 3)
    batch["valid"][1] = False
    logits = random(3, 4, 4, 6)
    total, count, _ = only("shapes", batch, logits)
    large = F.interpolate(logits, size=(16, 24), mode="bilinear")
    expected = F.cross_entropy(large[[0, 2]], batch["masks"][[0, 2]], ignore_index=-1, reduction="sum")
    assert total == pytest.approx(float(expected), rel=1e-12)
    assert count == int((batch["masks"][[0, 2]] >= 0).sum())


def test_dice_by_loops() -> None:
    logits, masks = random(2, 4, 5, 6), vision_batch([1, 1])["masks"][:, :5, :6].clone()
    masks[0] = masks[0].clamp(max=2)
    masks[1] = -1
    shares = logits.softmax(dim=1)
    losses = dice_loss(shares, masks)
    expected = []
    for label in range(3):
        there = masks[0] == label
        predicted = shares[0, label][masks[0] >= 0].sum()
        expected.append(1 - 2 * shares[0, label][there].sum() / (predicted + there.sum()))
    assert losses.tolist() == pytest.approx([float(sum(expected)) / 3, 0.0])
    perfect = F.one_hot(masks[:1].clamp(min=0), 4).permute(0, 3, 1, 2).double()
    assert dice_loss(perfect, masks[:1]).tolist() == [0.0]


def test_dice_counts_as_often_as_an_image_has_labelled_pixels() -> None:
    batch = vision_batch([1] * 2)
    logits = random(2, 4, 4, 6)
    plain, count, _ = only("shapes", batch, logits)
    both, same, _ = only("shapes", batch, logits, dice=0.5)
    shares = F.interpolate(logits, size=(16, 24), mode="bilinear").softmax(dim=1)
    pixels = (batch["masks"] >= 0).sum(dim=(1, 2))
    assert both - plain == pytest.approx(float((pixels * dice_loss(shares, batch["masks"])).sum()) / 2)
    assert count == same


def test_detection_by_loops() -> None:
    batch = vision_batch([2] * 3)
    output = random(3, 24, 8)
    output[..., 3:7] = F.softplus(output[..., 3:7])
    total, count, targets = only("boxes", batch, output)
    expected, positives = 0.0, 0
    for image in range(3):
        for cell in range(24):
            label = int(targets["cell_labels"][image, cell])
            for one, logit in enumerate(output[image, cell, :3].tolist()):
                p = 1 / (1 + math.exp(-logit))
                right = p if one == label else 1 - p
                expected -= (0.25 if one == label else 0.75) * (1 - right) ** 2 * math.log(right)
            if label < 0:
                continue
            positives += 1
            left, top, right, bottom = sides = targets["cell_sides"][image, cell].tolist()
            q = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
            p = 1 / (1 + math.exp(-float(output[image, cell, 7])))
            expected -= q * math.log(p) + (1 - q) * math.log(1 - p)
            expected += float(giou_loss(output[image, cell, 3:7], torch.tensor(sides).double()))
    assert count == positives > 5
    assert total == pytest.approx(expected, rel=1e-6)


def test_an_image_without_boxes_is_background() -> None:
    batch = vision_batch([2] * 2, box_labels=torch.full((2, 3), -1))
    output = random(2, 24, 8).abs()
    total, count, _ = only("boxes", batch, output)
    assert count == 0 and total > 0
    no_places = vision_batch(
        [2] * 2, boxes=torch.zeros(2, 0, 4), box_labels=torch.zeros(2, 0, dtype=torch.int64)
    )
    assert only("boxes", no_places, output)[:2] == (total, 0)


def test_boxes_outside_the_image_are_cropped_to_nothing() -> None:
    batch = vision_batch([2] * 2)
    output = random(2, 24, 8).abs()
    away = vision_batch([2] * 2, boxes=batch["boxes"] + 1000, box_labels=batch["box_labels"].clamp(min=0))
    none = vision_batch([2] * 2, box_labels=torch.full((2, 3), -1))
    assert only("boxes", away, output)[:2] == only("boxes", none, output)[:2]
    half = vision_batch([2], boxes=torch.tensor([[[-8.0, -8, 8, 8]]]), box_labels=torch.tensor([[1]]))
    _, count, targets = only("boxes", half, output[:1])
    assert count > 0 and targets["boxes"].tolist() == [[[0, 0, 8, 8]]]


def test_contrast_takes_the_heads_own_losses() -> None:
    batch = vision_batch([3] * 4)
    batch["valid"][1] = False
    output = random(4, 2).abs()
    total, count, _ = only("captions", batch, output)
    assert (total, count) == (pytest.approx(float(output[[0, 2, 3], 0].sum())), 3)


# --- all together ---

SECTIONS: dict[str, dict[str, Any]] = {
    "digits": {"weight": 0.5, "label_smoothing": 0.1},
    "shapes": {"weight": 2.0, "dice": 0.3},
    "boxes": {},
    "captions": {"weight": 0.25},
}


def mean_loss(objective: VisionObjective, parts: list[tuple[Any, Any]]) -> Tensor:
    """The loss of a global batch in these parts of outputs and targets."""
    results = [objective.loss(outputs, targets) for outputs, targets in parts]
    counts = torch.stack([counts for _, counts, _ in results]).sum(dim=0)
    return (torch.stack([sums for sums, _, _ in results]).sum(dim=0) / counts.clamp(min=1)).sum()


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("build", [vision_config, staged_config])
def test_cuts_of_the_batch_make_no_difference(weighting: str, build: Any) -> None:
    """Loss and gradients, without the contrastive task, whose head wants the whole batch."""
    config = build(NAMES[:3], task_weighting=weighting, input_size=[16, 24 if build is vision_config else 32])
    tasks = [number for number in ROUND if number < 3]
    batch = vision_batch(tasks)
    if build is staged_config:
        batch["x"] = F.pad(batch["x"], (0, 8))
        batch["masks"] = F.pad(batch["masks"], (0, 8))
    batch["valid"][1] = False
    objective = objective_of(config, **{name: SECTIONS[name] for name in NAMES[:3]})
    gradients = []
    for cuts in ([slice(0, 6)], [slice(0, 1), slice(1, 2), slice(2, 6)], [slice(3, 6), slice(0, 3)]):
        heads = heads_of(config)
        parts = []
        for cut in cuts:
            inputs, targets = objective.prepare(rows_of(batch, cut), 1)
            parts.append((run_heads(heads, inputs, cut, total=len(tasks)), targets))
        loss = mean_loss(objective, parts)
        loss.backward()
        gradients.append(
            {"loss": loss.detach()} | {name: parameter.grad for name, parameter in heads.named_parameters()}
        )
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-13, msg=name)
            assert value is not None and value.abs().sum() > 0, name


def test_weights_and_learned_variances() -> None:
    config = vision_config(task_weighting="uncertainty")
    heads, batch = heads_of(config), vision_batch()
    objective = objective_of(config, **SECTIONS)
    inputs, targets = objective.prepare(batch, 1)
    with torch.no_grad():
        outputs = run_heads(heads, inputs)
    sums, counts, metrics = objective.loss(outputs, targets)
    assert objective.metric_names == tuple(metrics) == tuple(f"{name}/loss" for name in NAMES)
    assert {name: int(count) for name, count in objective.metric_counts(targets).items()} == dict(
        zip(metrics, counts.tolist(), strict=True)
    )
    for number, name in enumerate(NAMES):
        s = float(heads.log_variance.detach()[number])  # type: ignore[union-attr]
        weight = SECTIONS[name].get("weight", 1.0)
        mean = float(metrics[f"{name}/loss"]) / int(counts[number])
        assert float(sums[number]) / int(counts[number]) == pytest.approx(weight * (math.exp(-s) * mean + s))
    fixed, _, _ = objective_of(vision_config(), **SECTIONS).loss(outputs[:4], targets)
    for number, name in enumerate(NAMES):
        expected = SECTIONS[name].get("weight", 1.0) * float(metrics[f"{name}/loss"])
        assert float(fixed[number]) == pytest.approx(expected)


@pytest.mark.parametrize("missing", range(4))
def test_a_task_without_samples_counts_nothing(missing: int) -> None:
    config = vision_config(task_weighting="uncertainty")
    heads = heads_of(config)
    objective = objective_of(config, shapes={"dice": 1.0})
    inputs, targets = objective.prepare(vision_batch([task for task in ROUND if task != missing]), 1)
    outputs = run_heads(heads, inputs)
    sums, counts, _ = objective.loss(outputs, targets)
    assert sums[missing] == 0 and counts[missing] == 0 and (sums != 0).sum() == 3
    (sums / counts.clamp(min=1)).sum().backward()
    for name, parameter in heads.named_parameters():
        mine = name.startswith(NAMES[missing])
        assert parameter.grad is not None and bool(parameter.grad.any()) == (not mine), name
    assert heads.log_variance.grad[missing] == 0  # type: ignore[union-attr, index]


def test_samples_that_could_not_be_read_count_nothing_whatever_they_hold() -> None:
    config = vision_config(("digits", "shapes", "boxes"))
    objective = objective_of(config)
    tasks = [0, 1, 2, 0, 1, 2]
    good = vision_batch(tasks)
    bad = vision_batch(tasks)
    for batch in (good, bad):
        batch["valid"][3:] = False
    bad["x"][3:] = math.nan
    bad["labels"][3:] = 99
    bad["masks"][3:] = 99
    bad["boxes"][3:] = math.nan
    bad["box_labels"][3:] = 99
    bad["tasks"][5] = 77
    results = []
    for batch in (good, bad):
        inputs, targets = objective.prepare(batch, 1)
        assert torch.isfinite(inputs["x"]).all()
        sums, counts, _ = objective.loss(run_heads(heads_of(config), inputs), targets)
        results.append((sums.tolist(), counts.tolist()))
    assert results[0] == results[1]


def test_nothing_is_there_to_be_learned_from() -> None:
    """Every pixel ignored, no box, no valid image: zeros, not NaN."""
    config = vision_config()
    heads, objective = heads_of(config), objective_of(config, shapes={"dice": 1.0})
    batch = vision_batch(masks=torch.full((8, 16, 24), -1), valid=torch.tensor(ROUND) != 3)
    batch["labels"][:] = -1
    batch["box_labels"][:] = -1
    inputs, targets = objective.prepare(batch, 1)
    sums, counts, _ = objective.loss(run_heads(heads, inputs), targets)
    assert counts.tolist() == [0, 0, 0, 0] and sums[[0, 1, 3]].tolist() == [0, 0, 0] and sums[2] > 0
    sums.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in heads.parameters())  # type: ignore[arg-type]


def test_labels_are_not_shown_to_the_model() -> None:
    inputs, targets = objective_of().prepare(vision_batch(), 1)
    assert set(inputs) == {"x", "tasks", "valid", "sample_keys", "text"}
    assert {"tasks", "valid", "labels", "masks", "boxes", "box_labels", "cell_labels"} <= set(targets)


def test_packed_images_count_one_by_one() -> None:
    config = two_classifiers()
    objective = objective_of(config)
    labels = torch.tensor([[1, 2, -1], [0, 3, 4]])
    valid = torch.tensor([[True, True, False], [True, False, True]])
    batch = {
        "x": torch.zeros(2, 9, 64),
        "positions": torch.zeros(2, 9, 2, dtype=torch.int64),
        "document_ids": torch.zeros(2, 9, dtype=torch.int64),
        "sizes": torch.ones(2, 3, 2, dtype=torch.int64),
        "sample_keys": torch.arange(2),
        "image_keys": torch.arange(6).view(2, 3),
        "tasks": torch.tensor([1, 0]),
        "valid": valid,
        "labels": labels,
    }
    inputs, targets = objective.prepare(batch, 1)
    assert "image_keys" not in inputs and {"positions", "document_ids", "sizes"} <= set(inputs)
    logits = [random(2, 3, 7, seed=seed) for seed in (0, 1)]
    sums, counts, _ = objective.loss(logits, targets)
    assert counts.tolist() == [2, 2]
    expected = [
        F.cross_entropy(logits[0][1, [0, 2]], labels[1, [0, 2]], reduction="sum"),
        F.cross_entropy(logits[1][0, :2], labels[0, :2], reduction="sum"),
    ]
    torch.testing.assert_close(sums, torch.stack(expected))
    with pytest.raises(ValueError, match=r"labels of the data hold 9, .*model\.tasks\.first\.num_classes=7"):
        objective.prepare({**batch, "labels": labels.masked_fill(labels == 4, 9)}, 1)
    # Of an image that could not be read no label is looked at.
    objective.prepare({**batch, "labels": labels.masked_fill(labels == 3, 9)}, 1)


def two_classifiers() -> VisionConfig:
    task = {"kind": "classify", "num_classes": 7}
    values = vision_config(("digits",)).model_dump(exclude_unset=True)
    return VisionConfig.model_validate({**values, "tasks": {"first": task, "second": task}})


def test_half_precision_outputs_are_widened() -> None:
    config = vision_config()
    objective = objective_of(config, shapes={"dice": 0.5})
    inputs, targets = objective.prepare(vision_batch(), 1)
    outputs = run_heads(heads_of(config), inputs)
    exact, _, _ = objective.loss(outputs, targets)
    sums, _, metrics = objective.loss([output.bfloat16() for output in outputs], targets)
    assert sums.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
    torch.testing.assert_close(sums.double(), exact, rtol=0.02, atol=0)


def test_sizes_are_enough_where_there_are_no_values() -> None:
    """As when memory is counted: every sample is taken for every task's."""
    config = vision_config()
    objective = objective_of(config)
    batch = {name: value.to("meta") for name, value in vision_batch().items()}
    _, targets = objective.prepare(batch, 1)
    shapes = [(8, 7), (8, 4, 4, 6), (8, 24, 8), (8, 2)]
    outputs = tuple(torch.empty(shape, device="meta") for shape in shapes)
    sums, counts, _ = objective.loss(outputs, targets)
    assert sums.shape == counts.shape == (4,) and sums.is_meta
