"""What a family of models is trained for: all that differs between families, apart from the model.

The split into `prepare` and `loss` lets the last stage of a pipeline own the loss while every rank knows the
count that it is divided by.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Any]


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
        """How many terms the loss of `targets` sums, a scalar; needs no outputs."""

    def loss(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of the loss over the micro-batch, its count, and sums of metrics; each a scalar."""
