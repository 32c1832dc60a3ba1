"""The loss curves of several runs side by side: `triptych compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.tools.render import table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Comparison:
    """Training losses of runs, at the steps that all of them logged."""

    runs: tuple[str, ...]
    """Names of the run directories; the first is what the others are compared with."""
    steps: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]
    """losses[run][i]: at steps[i], in nats per token."""

    def difference(self, run: int) -> float:
        """Largest absolute difference of a run's losses from the first one's."""
        return max(abs(a - b) for a, b in zip(self.losses[0], self.losses[run]))

    def table(self) -> RenderableType:
        """A dozen of the common steps, the last among them, and the largest difference over all of them."""
        stride = max(1, -(-len(self.steps) // 12))
        shown = range((len(self.steps) - 1) % stride, len(self.steps), stride)
        rows: list[list[object]] = [
            [self.steps[i], *(f"{losses[i]:.6f}" for losses in self.losses)] for i in shown
        ]
        rows.append(
            ["largest difference", "", *(f"{self.difference(r):.1e}" for r in range(1, len(self.runs)))]
        )
        return table_of(f"Training loss at {len(self.steps)} common steps", ["step", *self.runs], rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "steps": list(self.steps),
            "losses": {run: list(losses) for run, losses in zip(self.runs, self.losses)},
            "largest_difference": {run: self.difference(i) for i, run in enumerate(self.runs)},
        }


def compare(run_dirs: Sequence[Path]) -> Comparison:
    """The losses that the runs logged at the same steps.

    Raises ValueError for fewer than two runs, one without metrics, or no step that all of them logged.
    """
    if len(run_dirs) < 2:
        raise ValueError(f"{len(run_dirs)} run(s) given; name two or more run directories to compare")
    curves = [read_losses(run_dir) for run_dir in run_dirs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        logged = "; ".join(f"{run}: {len(curve)} steps" for run, curve in zip(run_dirs, curves))
        raise ValueError(f"the runs logged no step in common ({logged}); give them the same log.every")
    return Comparison(
        runs=tuple(str(run) for run in run_dirs),
        steps=tuple(steps),
        losses=tuple(tuple(curve[step] for step in steps) for curve in curves),
    )


def read_losses(run_dir: Path) -> dict[int, float]:
    """Step -> training loss, from a run's metrics. Raises ValueError where there are none."""
    path = run_dir / METRICS
    if not path.is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no {METRICS}")
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records}
