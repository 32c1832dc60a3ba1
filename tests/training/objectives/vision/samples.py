"""Batches of samples for the four tasks of tests/models/tasks.py, in images of 16 x 24 pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.tasks import features_of, texts, vision_config
from triptych.models.context import Context
from triptych.models.heads import Heads
from triptych.models.vision_config import VisionConfig
from triptych.training.objectives.config import VisionTaskConfig
from triptych.training.objectives.vision import VisionObjective

ROUND = [0, 1, 2, 3, 2, 1, 0, 3]
"""Tasks of eight samples, by number: classify, segment, detect, contrast."""


def objective_of(config: VisionConfig | None = None, **tasks: dict[str, Any]) -> VisionObjective:
    """tasks: sections of train.tasks."""
    sections = {name: VisionTaskConfig.model_validate(values) for name, values in tasks.items()}
    return VisionObjective(config or vision_config(), sections)


def vision_batch(tasks: list[int] = ROUND, **changes: Any) -> dict[str, Any]:
    """Samples whose contents are a function of their number; each carries the labels of its task alone."""
    rows = len(tasks)
    generator = torch.Generator().manual_seed(3)
    number = torch.tensor(tasks)
    pixels = torch.randn(rows, 1, 16, 24, generator=generator)
    masks = torch.randint(-1, 4, (rows, 16, 24), generator=generator)
    low = torch.rand(rows, 3, 2, generator=generator) * torch.tensor([16.0, 10.0])
    high = low + 3 + torch.rand(rows, 3, 2, generator=generator) * torch.tensor([12.0, 8.0])
    box_labels = torch.randint(0, 3, (rows, 3), generator=generator)
    box_labels[:, 2] = torch.where(torch.arange(rows) % 2 == 0, -1, box_labels[:, 2])
    of = [number == task for task in range(4)]
    batch = {
        "x": pixels,
        "tasks": number,
        "valid": torch.ones(rows, dtype=torch.bool),
        "sample_keys": torch.arange(rows) * 7919 + 13,
        "labels": torch.where(of[0], torch.arange(rows) % 7, -1),
        "labels_other": torch.where(of[0], (torch.arange(rows) + 3) % 7, -1),
        "share": torch.where(of[0], torch.linspace(0.6, 1.0, rows), torch.ones(rows)),
        "masks": torch.where(of[1][:, None, None], masks, -1),
        "boxes": torch.where(of[2][:, None, None], torch.cat([low, high], dim=2), 0.0),
        "box_labels": torch.where(of[2][:, None], box_labels, -1),
        "text": torch.where(of[3][:, None, None], texts(rows), 0.0),
    }
    return batch | changes


def rows_of(batch: dict[str, Any], rows: Tensor | slice) -> dict[str, Any]:
    return {name: value[rows] for name, value in batch.items()}


def run_heads(
    heads: Heads, inputs: dict[str, Any], rows: Tensor | slice = slice(None), total: int | None = None
) -> tuple[Tensor, ...]:
    """Outputs for features that are a function of the sample's place in the whole batch of `total`."""
    config = heads.config
    dtype = next(heads.parameters()).dtype
    features, earlier, grid = features_of(config, total or len(inputs["tasks"]), dtype)
    context = Context(tasks=inputs["tasks"])
    text = inputs["text"].to(dtype) if "text" in inputs else None
    parts = [part[rows] for part in (features, *earlier)]
    outputs: tuple[Tensor, ...] = heads(*parts, context=context, grid=grid, text=text, valid=inputs["valid"])
    return outputs
