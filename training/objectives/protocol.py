"""What a family of models is trained for: all that differs between families, apart from the model.

The split into `prepare` and `loss` lets the last stage of a pipeline own the loss while every rank knows the
count that it is divided by.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Any]


class Meter(Protocol):
    """Collects a validation's outputs for metrics that are no means over samples."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a micro-batch."""

    def state(self) -> Any:
        """What this rank collected, to be sent to the others."""

    def merge(self, states: list[Any]) -> dict[str, float]:
        """Metrics by name, of the states of all ranks."""


class Objective(Protocol):
    """Turns batches into inputs and targets, and a model's outputs into a sum and a count."""

    metric_names: tuple[str, ...]
    """Keys of the metrics that `loss` returns, the same on every rank."""

    def prepare(self, batch: Batch, step: int, training: bool = True) -> tuple[Batch, Any]:
        """Inputs and targets of one micro-batch; noise may depend on the samples' keys and the step.

        The targets are whatever `loss` reads: a tensor, or several by name.

        training: False in a validation, where nothing is dropped or left out.
        """

    def count(self, targets: Any) -> Tensor:
        """How many terms the loss of `targets` sums; needs no outputs. A scalar, or one per task: the parts
        of the loss are divided by theirs and added up."""

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of the loss over the micro-batch and its count, shaped alike, and sums of metrics, scalars."""

    def metric_counts(self, targets: Any) -> dict[str, Tensor]:
        """What the sum of each metric is divided by, summed over the global batch."""

    def meter(self) -> Meter | None:
        """A new collector of what is no mean over samples, for a validation; None where there is nothing."""
