"""Made-up batches of the vision family: shapes to count with, random samples to verify on."""

from __future__ import annotations

import torch

from triptych.models import VisionConfig
from triptych.training.objectives import Batch

BOXES = 4
"""Places for boxes of a made-up sample."""


def vision_batch(
    model: VisionConfig, shape: tuple[int, ...], count: int, draw: torch.Generator, dtype: torch.dtype
) -> Batch:
    """Whole images x (count, *shape) of all tasks in turn, the last one unreadable, with every task's
    labels."""
    x = torch.randn(count, *shape, generator=draw, dtype=dtype)
    batch: Batch = {
        "x": x,
        "tasks": torch.arange(count) % len(model.tasks),
        "valid": torch.arange(count) != count - 1 if count > 2 else torch.ones(count, dtype=torch.bool),
        "sample_keys": torch.randint(2**62, (count,), generator=draw),
    }
    kinds = {task.kind: task for task in model.tasks.values()}
    of_kind = {
        kind: torch.tensor([task.kind == kind for task in model.tasks.values()])[batch["tasks"]]
        for kind in kinds
    }
    least = {
        kind: min(task.num_classes or 1 for task in model.tasks.values() if task.kind == kind)
        for kind in kinds
    }
    if "classify" in kinds:
        for name in ("labels", "labels_other"):
            labels = torch.randint(least["classify"], (count,), generator=draw)
            batch[name] = torch.where(of_kind["classify"], labels, -1)
        batch["share"] = torch.rand(count, generator=draw)
    if "segment" in kinds:
        masks = torch.randint(-1, least["segment"], (count, *shape[1:]), generator=draw)
        batch["masks"] = torch.where(of_kind["segment"].view(-1, 1, 1), masks, -1)
    if "detect" in kinds:
        batch |= _boxes(shape, count, least["detect"], of_kind["detect"], draw)
    if "contrast" in kinds:
        size = (count, kinds["contrast"].text_length, kinds["contrast"].text_size)
        batch["text"] = torch.randn(size, generator=draw, dtype=dtype)
    return batch


def _boxes(
    shape: tuple[int, ...], count: int, classes: int, wanted: torch.Tensor, draw: torch.Generator
) -> Batch:
    """Up to `BOXES` boxes of at least a quarter of the image each way."""
    height, width = shape[1:]
    edge = torch.tensor([width, height])
    size = (0.25 + 0.5 * torch.rand(count, BOXES, 2, generator=draw)) * edge
    corner = torch.rand(count, BOXES, 2, generator=draw) * (edge - size)
    labels = torch.randint(classes, (count, BOXES), generator=draw)
    there = wanted.unsqueeze(1) & (torch.rand(count, BOXES, generator=draw) < 0.7)
    return {
        "boxes": torch.cat([corner, corner + size], dim=-1) * there.unsqueeze(-1),
        "box_labels": torch.where(there, labels, -1),
    }


def packed_vision_batch(batch: Batch, model: VisionConfig, draw: torch.Generator) -> Batch:
    """Of packed rows of images as denoisers have them (positions, document_ids, sizes, valid): the labels and
    tasks of the vision family."""
    count, images = batch["sizes"].shape[:2]
    tasks = torch.arange(count) % len(model.tasks)
    classes = min(task.num_classes or 1 for task in model.tasks.values())
    labels = torch.randint(classes, (count, images), generator=draw)
    return {**batch, "tasks": tasks, "labels": torch.where(batch["valid"], labels, -1)}
