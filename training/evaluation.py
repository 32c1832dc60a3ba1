"""The loss of one global batch, or of a fixed set of samples, as sums over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triptych.parallel.model import ParallelModel
from triptych.training.group import Group
from triptych.training.objectives import Batch, Meter, Objective


@dataclass(frozen=True)
class Sums:
    """Sums over the global batch, the same on every rank."""

    loss: float
    metrics: dict[str, float]
    bad_data_ranks: tuple[int, ...]
    """Data ranks whose own loss was not finite."""


@dataclass(frozen=True)
class Counts:
    """Terms of the sums over the global batch, by which they are divided; by 1 where there are none.

    loss: a scalar, or one per task. metrics: one per name of the objective's metrics.
    """

    loss: Tensor
    metrics: Tensor


class MicroBatchLoss:
    """What the last stage calls per micro-batch: the loss over the global counts, parts of a vector added up.

    sums, metrics: the undivided sums of all calls, in float64. meter: sees outputs and targets, if given.
    """

    def __init__(
        self, objective: Objective, counts: Counts, device: torch.device, meter: Meter | None = None
    ) -> None:
        self.objective = objective
        self.counts = counts
        self.meter = meter
        self.sums = torch.zeros_like(counts.loss)
        self.metrics = torch.zeros(len(objective.metric_names), dtype=torch.float64, device=device)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        total, _, metrics = self.objective.loss(outputs, targets)
        self.sums += total.detach()
        for place, name in enumerate(self.objective.metric_names):
            self.metrics[place] += metrics[name].detach()
        if self.meter is not None:
            self.meter.update(outputs, targets)
        return (total / self.counts.loss.clamp(min=1.0).to(total.dtype)).sum()


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


def global_counts(model: ParallelModel, objective: Objective, batches: Sequence[Batch]) -> Counts:
    """Terms of the sums over the global batch; needs no forward pass."""
    loss = torch.stack([objective.count(batch["targets"]) for batch in batches]).sum(0).double()
    names = objective.metric_names
    found = [objective.metric_counts(batch["targets"]) for batch in batches] if names else []
    metrics = [torch.stack([counts[name] for counts in found]).sum().double() for name in names]
    flat = model.sum_over_data(torch.cat([loss.reshape(-1), *(count.reshape(1) for count in metrics)]))
    return Counts(flat[: loss.numel()].view(loss.shape), flat[loss.numel() :])


def global_sums(
    model: ParallelModel, function: MicroBatchLoss, loss: Tensor, dp_rank: int, dp_size: int
) -> Sums:
    """Sum this rank's loss and metrics over all ranks, in float64."""
    bad = torch.zeros(dp_size, dtype=torch.float64, device=loss.device)
    bad[dp_rank] = float(not torch.isfinite(loss))
    local = torch.cat(
        [loss.detach().double().reshape(1), function.metrics / function.counts.metrics.clamp(min=1.0), bad]
    )
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
) -> tuple[float, dict[str, float]]:
    """Mean loss and metrics over this rank's `batches` and everyone else's; dropout is off.

    The same on every rank, and on every layout as long as the ranks' batches are together the same samples.
    """
    names = objective.metric_names
    meter = objective.meter()
    counting = meter if model.counts_outputs else None
    totals: Tensor | None = None
    size = 0
    for batch in batches:
        micro_batches = prepare(objective, to_device(batch, device), step, training=False)
        counts = global_counts(model, objective, micro_batches)
        function = MicroBatchLoss(objective, counts, device, counting)
        model.forward(micro_batches, function)
        sums = model.sum_over_data(torch.cat([function.sums.reshape(-1).double(), function.metrics]))
        size = counts.loss.numel()
        both = torch.stack([sums, torch.cat([counts.loss.reshape(-1), counts.metrics])])
        totals = both if totals is None else totals + both
    if totals is None:
        return 0.0, {}
    means = (totals[0] / totals[1].clamp(min=1.0)).tolist()
    metrics = dict(zip(names, means[size:]))
    if meter is not None:
        metrics |= meter.merge(Group().gather(meter.state()))
    return sum(means[:size]), metrics
