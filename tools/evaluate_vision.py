"""How well does a vision run do its tasks? `triptych evaluate` of such a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triptych.data_pipeline.images import dataset as images
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.loader import BatchLoader
from triptych.models import VisionConfig
from triptych.tools.render import table_of
from triptych.tools.trained import Trained, load_trained
from triptych.training.data import image_needs
from triptych.training.evaluation import Counts, MicroBatchLoss, prepare, to_device
from triptych.training.objectives import build_objective

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class VisionEvaluation:
    """Metrics over the validation images, such as digits/top1, as shares of 1; losses per task."""

    step: int
    parameters: int
    samples: int
    metrics: dict[str, float]

    def table(self) -> RenderableType:
        """The numbers as a rich renderable."""
        rows = [[name, f"{value:.4f}"] for name, value in self.metrics.items()]
        rows += [["samples", f"{self.samples:,}"], ["parameters", f"{self.parameters:,}"]]
        return table_of(f"Step {self.step}", ["figure", "value"], rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def evaluate_vision(
    path: str | Path,
    *,
    samples: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> VisionEvaluation:
    """Metrics of each task of the checkpoint at `path` (run directory or checkpoint, of any layout).

    samples: validation images of each source; None: all. batch_size: images at a time.
    Raises ValueError when checkpoint or data are not where the run says they are, or a size is below 1.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} evaluates nothing; give 1 or more")
    return evaluate_trained(load_trained(path, device), samples, batch_size, progress)


@torch.no_grad()
def evaluate_trained(
    trained: Trained, samples: int | None, batch_size: int, progress: Callable[[str], None] | None = None
) -> VisionEvaluation:
    """The same of a model that is loaded."""
    say = progress or (lambda line: None)
    if not isinstance(trained.model, VisionConfig):
        raise ValueError(f"the run is of model.family={trained.model.family}, which has no tasks of vision")
    assert isinstance(trained.data, ImageDataConfig), "vision models read images"
    # A trained model has the sections that these two read.
    sections: Any = trained
    objective = build_objective(sections)
    validation = images.open_validation(
        trained.data, image_needs(sections), limit=samples, global_batch_size=batch_size
    )
    if validation is None:
        raise ValueError(
            "the run's configuration names no validation images (data.valid): there is nothing to evaluate on"
        )
    say(f"step {trained.step}: {len(validation)} images")
    meter = objective.meter()
    assert meter is not None, "vision has metrics"
    totals: dict[str, float] = dict.fromkeys(objective.metric_names, 0.0)
    counts: dict[str, float] = dict.fromkeys(objective.metric_names, 0.0)
    with BatchLoader(validation, batch_size, batch_size, read_ahead=1) as loader:
        for batches in loader:
            (batch,) = prepare(objective, to_device(batches, trained.device), trained.step, training=False)
            with trained.autocast():
                outputs = trained.module(batch["x"], **trained.module.keywords(batch))
            count = objective.count(batch["targets"])
            function = MicroBatchLoss(objective, Counts(count.double(), torch.ones(0)), trained.device, meter)
            function(outputs, batch["targets"])
            found = objective.metric_counts(batch["targets"])
            for name, value in zip(objective.metric_names, function.metrics.tolist()):
                totals[name] += value
                counts[name] += float(found[name])
    metrics = {name: totals[name] / max(counts[name], 1.0) for name in totals} | meter.merge([meter.state()])
    return VisionEvaluation(
        step=trained.step,
        parameters=sum(parameter.numel() for parameter in trained.module.parameters()),
        samples=len(validation),
        metrics=metrics,
    )
