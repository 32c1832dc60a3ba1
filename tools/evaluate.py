"""Validation loss of a checkpoint, beside a bigram model on the same targets: `triptych evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropies in nats per token over `targets` validation targets."""

    step: int
    loss: float
    targets: int
    bits_per_byte: float | None
    bigram_loss: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        raise NotImplementedError

    def table(self) -> RenderableType:
        """The numbers as a rich renderable."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        raise NotImplementedError


def evaluate(
    path: str | Path,
    *,
    samples: int | None = None,
    baseline: bool = False,
    batch_size: int = 8,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Validation loss of the checkpoint at `path` (run directory or checkpoint, of any layout) on one device.

    samples: validation sequences to use; None takes what the run's own evaluation takes.
    baseline: also fit the interpolated bigram model on the training split and give its cross-entropy on
    exactly the same targets.
    Raises ValueError when checkpoint or validation corpus are not where the run says they are.
    """
    raise NotImplementedError
