"""Bytes that autograd keeps for one block, per layout: `triptych bench activations`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class ActivationReport:
    """Rows of (block, tp, sequence parallel, recompute, bytes, bytes by formula, what differs)."""

    rows: list[Any]

    def table(self) -> RenderableType:
        """The rows as a rich renderable."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        raise NotImplementedError


def activation_report(
    *,
    tensor_parallel: Sequence[int] = (1, 2, 4),
    processes: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ActivationReport:
    """Measure an attention + GELU block and a Mamba-2 block in bf16 under each layout, against the formulas.

    processes: count with real gloo processes for tp > 1 instead of shape arithmetic on the meta device.
    """
    raise NotImplementedError
