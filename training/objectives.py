"""What a family of models is trained for: all that differs between families, apart from the model.

The split into `prepare` and `loss` lets the last stage of a pipeline own the loss while every rank knows the
count that it is divided by.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100
Batch = dict[str, Any]


class Objective(Protocol):
    """Turns batches into inputs and targets, and a model's outputs into a sum and a count."""

    metric_names: tuple[str, ...]
    """Keys of the metrics that `loss` returns, the same on every rank."""

    def prepare(self, batch: Batch, step: int) -> tuple[Batch, Tensor]:
        """Inputs and targets of one micro-batch; noise may depend on the samples' keys and the step."""

    def count(self, targets: Tensor) -> Tensor:
        """How many terms the loss of `targets` sums, a scalar; needs no outputs."""

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of the loss over the micro-batch, its count, and sums of metrics; each a scalar."""


class LanguageModeling:
    """Next-token cross-entropy in nats, averaged over the targets that are not ignored.

    The model's last stage computes the per-token loss itself (its vocabulary may be cut over ranks), so
    `outputs` are (B, T) and 0 where the target is ignored.
    """

    metric_names: tuple[str, ...] = ()

    def prepare(self, batch: Batch, step: int) -> tuple[Batch, Tensor]:
        """The batch as it is, and its targets (B, T)."""
        return batch, batch["targets"]

    def count(self, targets: Tensor) -> Tensor:
        """Targets that are not ignored."""
        return (targets != IGNORED).sum()

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of per-token losses (B, T), in float32 at least."""
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        return wide.sum(), self.count(targets), {}
