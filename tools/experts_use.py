"""Which experts does each task use? `triptych experts use`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triptych.data_pipeline.loader import BatchLoader
from triptych.models import VisionConfig
from triptych.tools.evaluate_vision import evaluate_trained
from triptych.tools.experts import Mixture, mixtures, task_named
from triptych.tools.render import table_of
from triptych.tools.trained import Trained, load_trained
from triptych.training.data import open_validation
from triptych.training.evaluation import prepare, to_device
from triptych.training.expert_pictures import load_picture
from triptych.training.objectives import build_objective
from triptych.training.pictures import write_png

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Use:
    """One task's use of the experts of one layer."""

    name: str
    """Of the layer's module, such as blocks.1.ffn."""
    task: str
    shares: list[float]
    """Of the task's choices that fell on each expert; zeros for a task without tokens."""

    @property
    def label(self) -> str:
        """For a table or picture."""
        return f"{self.name}  {self.task}".rstrip()


@dataclass(frozen=True)
class ExpertUse:
    """Of a run, over its validation data."""

    step: int
    samples: int | None
    uses: list[Use]
    metrics: dict[str, float]
    picture: str | None
    """File that was written."""

    def table(self) -> RenderableType:
        """Shares in per cent, a line per layer and task."""
        widest = max(len(use.shares) for use in self.uses)
        rows = [
            [use.label, *(f"{100 * share:.1f}" for share in use.shares), *[""] * (widest - len(use.shares))]
            for use in self.uses
        ]
        title = f"Step {self.step}: per cent of a task's choices that fall on each expert"
        caption = "; ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return table_of(title, ["layer, task", *map(str, range(widest))], rows, caption)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def expert_use(
    path: str | Path,
    *,
    task: str | None = None,
    out: str | Path | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExpertUse:
    """Shares of the choices that each expert gets, by layer and task, on the validation data of a run.

    path: a run directory or a checkpoint. task: of this one alone. out: a PNG to draw, a line per layer and
    task, a cell per expert. samples: of the validation data, of each source; None: all of it.
    Raises ValueError when checkpoint or data are not where the run says they are, or there are no experts.
    """
    trained = load_trained(path, device)
    if task is not None:
        task_named(trained.module, task)
    observed = observe(trained, samples, batch_size, progress)
    uses = [
        Use(mixture.name, name, shares.tolist())
        for mixture, loads in observed.loads
        for name, shares in loads.items()
        if task is None or name == task
    ]
    if out is not None:
        rows = {use.label: torch.tensor(use.shares, dtype=torch.float64) for use in uses}
        write_png(Path(out).expanduser(), load_picture(rows))
    picture = None if out is None else str(out)
    return ExpertUse(trained.step, samples, uses, of_task(observed.metrics, task or ""), picture)


def of_task(metrics: dict[str, float], task: str) -> dict[str, float]:
    """Those of one task; all of them for ""."""
    return {name: value for name, value in metrics.items() if not task or name.startswith(f"{task}/")}


@dataclass(frozen=True)
class Observed:
    """What a pass over the validation data showed."""

    loads: list[tuple[Mixture, dict[str, torch.Tensor]]]
    """Per layer, by task: shares of its choices, float64 (E,)."""
    metrics: dict[str, float]


def observe(
    trained: Trained, samples: int | None, batch_size: int, progress: Progress | None = None
) -> Observed:
    """Runs the validation data through the model while its routers keep a record. Metrics as `measure`."""
    layers = mixtures(trained.module)
    for layer in layers:
        layer.router.take_record()
        layer.router.observing = True
    try:
        metrics = measure(trained, samples, batch_size, progress)
    finally:
        for layer in layers:
            layer.router.observing = False
    return Observed(
        [(layer, layer.router.figures(layer.router.take_record())["task_load"]) for layer in layers], metrics
    )


@torch.no_grad()
def measure(
    trained: Trained, samples: int | None, batch_size: int, progress: Progress | None = None
) -> dict[str, float]:
    """Metrics on the validation data: each task's of a vision model, the mean loss of others.

    Raises ValueError where the run names no validation data.
    """
    if batch_size < 1 or (samples is not None and samples < 1):
        raise ValueError(f"samples={samples}, batch_size={batch_size}: nothing is read; give 1 or more")
    if isinstance(trained.model, VisionConfig):
        return evaluate_trained(trained, samples, batch_size, progress).metrics
    limit = trained.train.model_copy(update={} if samples is None else {"eval_samples": samples})
    run: Any = _Sections(
        trained.model, trained.data, limit.model_copy(update={"global_batch_size": batch_size})
    )
    objective, validation = build_objective(run), open_validation(run)
    if validation is None:
        raise ValueError("the run's configuration names no validation data (data.valid)")
    module: Any = trained.module
    total, terms = 0.0, 0.0
    for first in range(0, len(validation), batch_size):
        size = min(batch_size, len(validation) - first)
        with BatchLoader(validation, size, size, consumed=first, read_ahead=0) as loader:
            batches = to_device(next(loader), trained.device)
        (batch,) = prepare(objective, batches, trained.step, training=False)
        inside = {"targets": batch["targets"]} if module.targets_inside else {}
        with trained.autocast():
            outputs = module(batch[module.main_input], **module.keywords(batch), **inside)
        loss, count, _ = objective.loss(outputs, batch["targets"])
        total, terms = total + float(loss.double()), terms + float(count)
    return {"loss": total / max(terms, 1.0)}


@dataclass(frozen=True)
class _Sections:
    """What data and objective read of a run."""

    model: Any
    data: Any
    train: Any
