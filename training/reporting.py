"""From the numbers of a step to reports: speed, MFU, time left; rank 0 alone reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml

from triptych.models import flops_per_token
from triptych.training.evaluation import Sums
from triptych.training.expert_pictures import RouterFigures, load_pictures, scalars_of
from triptych.training.image_grids import save_grid
from triptych.training.metrics import MetricsWriter, StepReport, Stopwatch, memory_bytes, peak_flops
from triptych.training.pictures import Pictures
from triptych.training.sections import RunSections, as_json, tokens_per_sample

_BACKWARD_AND_FORWARD = 3.0
# Phases that are not training: they do not count against tokens per second.
_ASIDE = ("evaluate", "images", "save")


class Reporter:
    """Turns steps into StepReports for the metrics files and for `listener`.

    start: the step from which this process goes on.
    """

    def __init__(
        self,
        run: RunSections,
        run_dir: Path,
        *,
        start: int,
        device: torch.device,
        world_size: int,
        listener: Callable[[StepReport], None] | None,
    ) -> None:
        self.run = run
        self.device = device
        self.listener = listener
        self._run_dir = run_dir
        self.writer = MetricsWriter(
            run_dir,
            start=start,
            tensorboard=run.log.tensorboard,
            config_text=yaml.safe_dump(as_json(run), sort_keys=False),
        )
        self._tokens_per_step = run.train.global_batch_size * tokens_per_sample(run)
        self._flops = _BACKWARD_AND_FORWARD * flops_per_token(run.model, tokens_per_sample(run))["total"]
        peak = peak_flops(device, run.train.precision)
        self._peak = None if peak is None else peak * world_size
        self._start = self._before = start
        self._start_time = self._before_time = time.perf_counter()

    def report(
        self,
        step: int,
        loss: Sums,
        grad_norm: float,
        *,
        lr: float,
        tokens: int,
        skipped: bool,
        skipped_steps: int,
        valid_loss: float | None,
        valid_metrics: dict[str, float],
        routing: dict[str, RouterFigures],
        stopwatch: Stopwatch,
    ) -> None:
        """Report step `step`; speed and phases are over the steps since the report before."""
        now = time.perf_counter()
        phases = stopwatch.take()
        seconds = now - self._before_time - sum(phases.get(name, 0.0) for name in _ASIDE)
        speed = (step - self._before) * self._tokens_per_step / max(seconds, 1e-9)
        pace = (now - self._start_time) / (step - self._start)
        report = StepReport(
            step=step,
            total=self.run.train.steps,
            loss=loss.loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=speed,
            memory_bytes=memory_bytes(self.device),
            mfu=None if self._peak is None else speed * self._flops / self._peak,
            eta_seconds=pace * (self.run.train.steps - step),
            skipped=skipped,
            skipped_steps=skipped_steps,
            valid_loss=valid_loss,
            phases=phases,
            metrics=loss.metrics,
            valid_metrics=valid_metrics,
            routing=scalars_of(routing),
        )
        self._before, self._before_time = step, now
        self.writer.write(report)
        if routing:
            for name, picture in load_pictures(routing).items():
                self.writer.write_image(name, picture, step)
        if self.listener is not None:
            self.listener(report)

    def show(self, step: int, picture: Pictures) -> None:
        """Write a picture drawn after step `step`."""
        save_grid(picture, self._run_dir, step)
        self.writer.write_image("samples", picture, step)

    def show_tasks(self, step: int, pictures: Mapping[str, Pictures]) -> None:
        """Show what a vision model says about some images, by task."""
        for name, picture in pictures.items():
            self.writer.write_image(f"tasks/{name}", picture, step)

    def close(self) -> None:
        """Flush the metrics files."""
        self.writer.close()
