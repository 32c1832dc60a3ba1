"""What a run reports about its steps: the progress line, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("triptych.training.metrics")

# Dense 16-bit peaks, FLOP/s; a device that is not listed has no MFU rather than a wrong one.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM3": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
}


@dataclass(frozen=True)
class StepReport:
    """One line of progress. `None` means not known or not measured in this step."""

    step: int
    """Steps done."""
    total: int
    """Steps of the whole run."""
    loss: float
    """Mean over the global batch; for a language model, nats per target."""
    lr: float
    """Learning rate of this step."""
    grad_norm: float
    """Global L2 norm before clipping."""
    tokens: int
    """Tokens seen since the run began, over all ranks."""
    tokens_per_second: float
    """Over all ranks, since the report before, validation and saving left out."""
    memory_bytes: int
    """Peak of rank 0: allocated on its GPU, or resident in its process on CPU."""
    mfu: float | None
    """Share of the dense 16-bit peak that the model's own FLOPs use (recomputation not counted)."""
    eta_seconds: float
    """Until the last step, at the pace of this process."""
    skipped: bool = False
    """The step was not finite: parameters stayed as they were."""
    skipped_steps: int = 0
    """Skipped steps since the run began."""
    valid_loss: float | None = None
    """Validation loss, after steps that validate."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds per phase of the loop since the report before."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's own metrics, each per its count."""
    valid_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics over the validation set, such as digits/top1, after steps that validate."""
    routing: dict[str, float] = field(default_factory=dict)
    """Of each router: dropped (share of the choices), entropy (nats), busiest and idlest (expert's load over
    the mean load), and its losses."""


class Stopwatch:
    """Seconds spent in named phases of the loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time within to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The phases since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class MetricsWriter:
    """Writes reports to <run>/metrics.jsonl and, if asked, to TensorBoard; only rank 0 has one.

    start: the step that is resumed; what an earlier process wrote of later steps is dropped, so that each
    step appears once.
    """

    def __init__(self, run_dir: Path, *, start: int, tensorboard: bool, config_text: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        truncate(self.path, start)
        self._file = open(self.path, "a")  # noqa: SIM115 - lives as long as the writer
        self._board: SummaryWriter | None = None
        if tensorboard:
            # Takes a second to import; a run without TensorBoard need not wait for it.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
            self._board.add_text("config", f"```yaml\n{config_text}\n```", start)

    def write(self, report: StepReport) -> None:
        """Append one report."""
        try:
            self._file.write(json.dumps(_finite(asdict(report))) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in scalars(report).items():
                    self._board.add_scalar(name, value, report.step)
        except OSError as error:
            # A full disk must not end the run.
            log.warning("metrics of step %d were not written: %s", report.step, error)

    def write_image(self, name: str, picture: Any, step: int) -> None:
        """A picture, uint8 (H, W, C), to TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what is unknown; JSON has no NaN, so a value that is not finite becomes null, also
    within the dicts that it holds."""
    return {key: _or_null(value) for key, value in record.items() if value is not None}


def _or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _or_null(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(report: StepReport) -> dict[str, float]:
    """The numbers of a report under their TensorBoard tags."""
    found: dict[str, float | None] = {
        "train/loss": report.loss,
        "train/learning_rate": report.lr,
        "train/grad_norm": report.grad_norm,
        "train/skipped_steps": report.skipped_steps,
        "train/tokens": report.tokens,
        "valid/loss": report.valid_loss,
        "speed/tokens_per_second": report.tokens_per_second,
        "speed/mfu": report.mfu,
        "memory/peak_bytes": report.memory_bytes,
    }
    found |= {f"seconds/{name}": seconds for name, seconds in report.phases.items()}
    found |= {f"train/{name}": value for name, value in report.metrics.items()}
    found |= {f"valid/{name}": value for name, value in report.valid_metrics.items()}
    found |= {f"experts/{name}": value for name, value in report.routing.items()}
    return {name: value for name, value in found.items() if value is not None}


def truncate(path: Path, step: int) -> None:
    """Drop records of steps after `step`, and a last line that a dying process left half-written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            log.warning("%s: dropping an unreadable line: %.60s", path, line)
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of `device` in FLOP/s; None where none is known, and for precisions other than bf16."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Dense 16-bit peak of the GPU that CUDA calls `name`, such as "NVIDIA H100 80GB HBM3"."""
    words = f" {name.replace('-', ' ')} "
    if " NVL " in words:
        # Clocked lower than its SXM namesake.
        return None
    return next((peak for known, peak in _PEAKS.items() if f" {known} " in words), None)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank so far: allocated on its GPU, or resident in its process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
