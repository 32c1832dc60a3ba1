"""The loss of one global batch, or of a fixed set of samples, as sums over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triptych.parallel.model import ParallelModel
from triptych.training.objectives import Batch, Objective


@dataclass(frozen=True)
class Sums:
    """Sums over the global batch, the same on every rank."""

    loss: float
    metrics: dict[str, float]
    bad_data_ranks: tuple[int, ...]
    """Data ranks whose own loss was not finite."""


class MicroBatchLoss:
    """What the last stage calls per micro-batch: the loss over `divisor`; metrics are summed up aside."""

    def __init__(self, objective: Objective, divisor: float, device: torch.device) -> None:
        self.objective = objective
        self.divisor = divisor
        self.metrics = torch.zeros(len(objective.metric_names), dtype=torch.float64, device=device)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total, _, metrics = self.objective.loss(outputs, targets)
        for place, name in enumerate(self.objective.metric_names):
            self.metrics[place] += metrics[name].detach() / self.divisor
        return total / self.divisor


def to_device(batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[Batch]:
    """Micro-batches on the model's device; values that are no tensors stay."""
    return [
        {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        for batch in batches
    ]


def prepare(objective: Objective, batches: Iterable[Batch], step: int, *, training: bool) -> list[Batch]:
    """The objective's inputs of each micro-batch, with its targets under `targets`."""
    prepared = []
    for batch in batches:
        inputs, targets = objective.prepare(batch, step, training)
        prepared.append({**inputs, "targets": targets})
    return prepared


def global_count(model: ParallelModel, objective: Objective, batches: Iterable[Batch]) -> float:
    """Terms of the loss in the global batch; needs no forward pass."""
    local = torch.stack([objective.count(batch["targets"]) for batch in batches]).sum()
    return float(model.sum_over_data(local.double()))


def global_sums(
    model: ParallelModel, function: MicroBatchLoss, loss: Tensor, dp_rank: int, dp_size: int
) -> Sums:
    """Sum this rank's loss and metrics over all ranks, in float64."""
    bad = torch.zeros(dp_size, dtype=torch.float64, device=loss.device)
    bad[dp_rank] = float(not torch.isfinite(loss))
    local = torch.cat([loss.detach().double().reshape(1), function.metrics.to(loss.device), bad])
    values = model.sum_over_data(local).tolist()
    names = function.objective.metric_names
    ranks = values[1 + len(names) :]
    return Sums(
        loss=values[0],
        metrics=dict(zip(names, values[1:], strict=False)),
        bad_data_ranks=tuple(rank for rank, flag in enumerate(ranks) if flag),
    )


def evaluate(
    model: ParallelModel,
    objective: Objective,
    batches: Iterable[Sequence[Mapping[str, Any]]],
    *,
    device: torch.device,
    step: int,
    dp_rank: int,
    dp_size: int,
) -> tuple[float, dict[str, float]]:
    """Mean loss and metrics over this rank's `batches` and everyone else's; dropout is off.

    The same on every rank, and on every layout as long as the ranks' batches are together the same samples.
    """
    loss, count = 0.0, 0.0
    metrics = dict.fromkeys(objective.metric_names, 0.0)
    for batch in batches:
        micro_batches = prepare(objective, to_device(batch, device), step, training=False)
        function = MicroBatchLoss(objective, 1.0, device)
        total = model.forward(micro_batches, function)
        sums = global_sums(model, function, total, dp_rank, dp_size)
        loss += sums.loss
        count += global_count(model, objective, micro_batches)
        metrics = {name: value + sums.metrics[name] for name, value in metrics.items()}
    count = max(count, 1.0)
    return loss / count, {name: value / count for name, value in metrics.items()}
