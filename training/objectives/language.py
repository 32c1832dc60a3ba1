"""Next-token prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.training.objectives.protocol import Batch

IGNORED = -100


class LanguageModeling:
    """Next-token cross-entropy in nats, averaged over the targets that are not ignored.

    The model's last stage computes the per-token loss itself (its vocabulary may be cut over ranks), so
    `outputs` are (B, T) and 0 where the target is ignored.
    """

    metric_names: tuple[str, ...] = ()

    def prepare(self, batch: Batch, step: int, training: bool = True) -> tuple[Batch, Tensor]:
        """The batch as it is, and its targets (B, T)."""
        return batch, batch["targets"]

    def count(self, targets: Tensor) -> Tensor:
        """Targets that are not ignored."""
        return (targets != IGNORED).sum()

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum of per-token losses (B, T), in float32 at least."""
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        return wide.sum(), self.count(targets), {}

    def metric_counts(self, targets: Tensor) -> dict[str, Tensor]:
        """There are no metrics."""
        return {}

    def meter(self) -> None:
        """There is none."""
