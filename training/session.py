"""One rank's run: everything the loop calls, built from a run's configuration.

session = build(run, run_dir=Path("runs/demo"), device=torch.device("cpu"), report=print)
session.fit()
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triptych.data_pipeline.loader import BatchLoader
from triptych.models import VisionConfig
from triptych.parallel.freezing import count_trainable
from triptych.parallel.layout import Layout, build_mesh
from triptych.parallel.model import ParallelModel
from triptych.parallel.parallelize import parallelize
from triptych.training import recovery, schedule, store
from triptych.training.check import check
from triptych.training.checkpoint import Checkpointer
from triptych.training.data import open_training, open_validation
from triptych.training.ema import EMA, PREFIX
from triptych.training.errors import NonFiniteLoss
from triptych.training.evaluation import (
    MicroBatchLoss,
    Sums,
    evaluate,
    global_counts,
    global_sums,
    prepare,
    to_device,
)
from triptych.training.expert_pictures import RouterFigures, natural
from triptych.training.finetune import start_from
from triptych.training.group import Group
from triptych.training.image_grids import ImageGrids
from triptych.training.loop import due, train
from triptych.training.metrics import StepReport, Stopwatch
from triptych.training.objectives import Batch, Objective, build_objective
from triptych.training.optimizer import AdamW
from triptych.training.profiling import StepProfiler
from triptych.training.reporting import Reporter
from triptych.training.sections import RunSections, as_json, tokens_per_sample
from triptych.training.shards import Window
from triptych.training.task_pictures import TaskPictures

log = logging.getLogger("triptych.training.session")

PARAMETER_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


def build(
    run: RunSections,
    *,
    run_dir: Path,
    device: torch.device,
    report: Callable[[StepReport], None] | None = None,
    objective: Objective | None = None,
    restarted: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> Session:
    """Build this rank's part of a run, resumed as `checkpoint.resume` says. All ranks call it together.

    run_dir: checkpoints, metrics and TensorBoard events go there; all ranks must see the same directory.
    device: this rank's. The default process group must have as many ranks as the layout; a layout of one rank
        needs none and gets one of its own.
    report: called on rank 0 with the report of each logged step.
    restarted: the same run died and is started again, so it goes on from its newest checkpoint whatever
        checkpoint.resume says.
    meta: JSON values to keep in the checkpoints, such as the git revision.
    Raises ValueError for what the configuration gets wrong, RuntimeError for what the machine lacks.
    """
    check(run)
    owns_group = _ensure_group(run)
    try:
        return Session(
            run,
            run_dir,
            device,
            objective=objective or build_objective(run),
            listener=report,
            restarted=restarted,
            meta=dict(meta or {}),
            owns_group=owns_group,
        )
    except BaseException:
        if owns_group:
            dist.destroy_process_group()
        raise


class Session:
    """One rank of a run. `build` makes it; `fit` runs it; the loop calls the rest, in its order."""

    def __init__(
        self,
        run: RunSections,
        run_dir: Path,
        device: torch.device,
        *,
        objective: Objective,
        listener: Callable[[StepReport], None] | None,
        restarted: bool,
        meta: dict[str, Any],
        owns_group: bool,
    ) -> None:
        self.run = run
        self.device = device
        self.objective = objective
        self.group = Group()
        self.layout = Layout(run.parallel)
        self.dp_rank = self.layout.dp_rank(self.group.rank)
        self.step = 0
        self.tokens = 0
        self.skipped_steps = 0
        self.valid_loss: float | None = None
        self.valid_metrics: dict[str, float] = {}
        self.routing: dict[str, Tensor] = {}
        self._meta = meta
        self._owns_group = owns_group
        self.model = _parallelize(run, self.layout, device)
        self.optimizer = AdamW(
            self.model.named_parameters(),
            run.train.optimizer,
            num_blocks=run.model.num_layers,
            frozen=run.train.freeze,
        )
        self.ema = EMA(self.model.named_parameters(), run.train.ema) if run.train.ema else None
        self.loader = self._loader(open_training(run), read_ahead=2)
        self.validation = open_validation(run)
        root = run_dir / recovery.CHECKPOINTS
        resumed = recovery.choose(run.checkpoint.resume, root, self.group, restarted=restarted)
        if resumed is not None:
            self.load(resumed)
        elif run.train.finetune is not None:
            start_from(self.model.shards(), run.train.finetune, run.model, self.group)
            if self.ema is not None:
                self.ema.restart()
        if self.group.rank == 0:
            log.info("training %d of %d parameters", *count_trainable(run.model, run.train.freeze))
        drawn = run.log.tensorboard and self.validation is not None and isinstance(run.model, VisionConfig)
        self.task_pictures = TaskPictures(run, self.model, self.objective) if drawn else None
        self.grids = ImageGrids(run, self.model, self.ema) if run.log.images else None
        self.grids_every = run.log.images.every if run.log.images else 0
        self.checkpointer = Checkpointer(
            root, keep=run.checkpoint.keep, async_save=run.checkpoint.async_save, group=self.group
        )
        self.stopwatch = Stopwatch()
        self.profiler = StepProfiler(run.log.profile, run_dir, self.group.rank)
        self.reporter: Reporter | None = None
        if self.group.rank == 0:
            self.reporter = Reporter(
                run,
                run_dir,
                start=self.step,
                device=device,
                world_size=self.group.size,
                listener=listener,
            )

    def fit(self) -> None:
        """Train to the last step, wait until its checkpoint is on disk, close the session."""
        try:
            train(self)
            self.checkpointer.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Let an outstanding checkpoint end and free what the session holds; no collective call."""
        self.checkpointer.close()
        self.loader.close()
        self.profiler.close()
        if self.reporter is not None:
            self.reporter.close()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    # What the loop calls, in its order.

    def fetch(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step `step`, on its device."""
        self.profiler.begin(step)
        with self.stopwatch.phase("data"):
            return prepare(self.objective, to_device(next(self.loader), self.device), step, training=True)

    def forward_backward(self, batch: list[Batch]) -> Sums:
        """Gradients of the mean loss over the global batch, and its value."""
        with self.stopwatch.phase("forward_backward"):
            counts = global_counts(self.model, self.objective, batch)
            function = MicroBatchLoss(self.objective, counts, self.device)
            local = self.model.forward_backward(batch, function)
            return global_sums(self.model, function, local, self.dp_rank, self.layout.dp_size)

    def reduce_and_clip(self) -> float:
        """Complete the gradients' sums over ranks, scale them down to max_grad_norm; the norm before that."""
        with self.stopwatch.phase("reduce_and_clip"):
            self.model.reduce_gradients()
            norm = float(self.model.grad_norm())
            limit = self.run.train.max_grad_norm
            if limit is not None and math.isfinite(norm) and norm > limit:
                self.model.scale_gradients(limit / norm)
            return norm

    def update(self, step: int, loss: Sums, grad_norm: float) -> None:
        """Step the optimizer, or skip a step that is not finite.

        Raises NonFiniteLoss once more than max_skipped_steps were to be skipped.
        """
        finite = _finite(loss, grad_norm)
        self.routing = self.model.update_routers(move=finite)
        if finite:
            with self.stopwatch.phase("optimizer"):
                self.optimizer.step(self.learning_rate(step))
                if self.ema is not None:
                    self.ema.update(step)
        else:
            self._skip(step, loss)
        self.model.zero_grad()
        self.profiler.end(step)
        self.step = step
        self.tokens += self.run.train.global_batch_size * tokens_per_sample(self.run)

    def evaluate(self) -> None:
        """Set `valid_loss`, the mean over the validation set, and `valid_metrics`."""
        assert self.validation is not None, "train.eval_every without data.valid is refused by check()"
        with self.stopwatch.phase("evaluate"), self._loader(self.validation, read_ahead=1) as batches:
            self.valid_loss, self.valid_metrics = evaluate(
                self.model, self.objective, batches, device=self.device, step=self.step
            )
            pictures = {} if self.task_pictures is None else self.task_pictures.draw(self.step)
        if self.reporter is not None:
            self.reporter.show_tasks(self.step, pictures)

    def report(self, step: int, loss: Sums, grad_norm: float) -> None:
        """Report, on rank 0, a step that is due, the last, one that validated or one that was skipped."""
        valid_loss, self.valid_loss = self.valid_loss, None
        valid_metrics, self.valid_metrics = self.valid_metrics, {}
        skipped = not _finite(loss, grad_norm)
        wanted = due(step, self.run.log.every, self.run.train.steps) or skipped or valid_loss is not None
        routing = self._gathered_routing() if wanted else {}
        if self.reporter is not None and wanted:
            self.reporter.report(
                step,
                loss,
                grad_norm,
                lr=self.learning_rate(step),
                tokens=self.tokens,
                skipped=skipped,
                skipped_steps=self.skipped_steps,
                valid_loss=valid_loss,
                valid_metrics=valid_metrics,
                routing=routing,
                stopwatch=self.stopwatch,
            )

    def draw_grid(self, step: int) -> None:
        """Draw the images of log.images, to TensorBoard and the run directory."""
        assert self.grids is not None, "grids_every is 0 without log.images"
        with self.stopwatch.phase("images"):
            picture = self.grids.render()
        if self.reporter is not None and picture is not None:
            self.reporter.show(step, picture)

    def save(self, step: int) -> None:
        """Begin a checkpoint of the state after step `step`."""
        with self.stopwatch.phase("save"):
            self.checkpointer.save(step, self._windows(), self.state_dict())

    # State.

    def load(self, directory: Path) -> None:
        """Restore parameters, moments and position from a checkpoint of any layout."""
        state = store.load_state(directory)
        recovery.check_same_run(directory, state["config"], as_json(self.run))
        with store.open_reader(directory) as reader:
            averaged = any(name.startswith(PREFIX) for name in reader.index)
            recovery.check_moments(directory, reader.index, self.optimizer.shards(self.model.shards()))
            for window in self._windows():
                if averaged or not window.name.startswith(PREFIX):
                    reader.read_into(window)
        if self.ema is not None and not averaged:
            self.ema.restart()
            if self.group.rank == 0:
                log.warning("%s has no averages (train.ema); they start from its parameters", directory)
        self.load_state_dict(state)
        if self.group.rank == 0:
            log.info("resumed step %d from %s", self.step, directory)
            if self.step >= self.run.train.steps:
                log.warning(
                    "nothing is left to do: %s has done %d steps and train.steps=%d; raise it to go on",
                    directory,
                    self.step,
                    self.run.train.steps,
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors that a checkpoint holds, as JSON values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "optimizer_updates": self.optimizer.updates,
            "data": self.loader.state_dict(),
            "seed": self.run.train.seed,
            "config": as_json(self.run),
            "versions": versions(),
            "meta": self._meta,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave; seed, configuration, versions and meta are for people."""
        self.step = state["step"]
        self.tokens = state["tokens"]
        self.skipped_steps = state["skipped_steps"]
        self.optimizer.updates = state["optimizer_updates"]
        self.loader.load_state_dict(state["data"])

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step`."""
        config = self.run.train
        return config.optimizer.lr * schedule.factor(config.schedule, step, config.steps)

    def _windows(self) -> Iterator[Window]:
        """Every tensor of the run's state that this rank holds, as a window that shares its storage."""
        for shard in self.model.shards():
            yield Window(
                f"model/{shard.name}", shard.tensor, shard.global_shape, shard.offset, shard.is_writer
            )
        yield from self.optimizer.shards(self.model.shards())
        if self.ema is not None:
            yield from self.ema.shards(self.model.shards())

    def _skip(self, step: int, loss: Sums) -> None:
        if self.skipped_steps >= self.run.train.max_skipped_steps:
            what = "the gradient norm" if math.isfinite(loss.loss) else "the loss"
            raise NonFiniteLoss(step, loss.bad_data_ranks, what, self.skipped_steps)
        self.skipped_steps += 1
        if self.group.rank == 0:
            log.warning(
                "step %d is skipped: loss %s (data ranks %s); %d of at most %d skipped steps",
                step,
                loss.loss,
                list(loss.bad_data_ranks),
                self.skipped_steps,
                self.run.train.max_skipped_steps,
            )

    def _gathered_routing(self) -> dict[str, RouterFigures]:
        """What the routers of all stages saw of the global batch, by name, in the order of the layers."""
        if not self.model.has_routers:
            return {}
        own = self.model.router_figures(self.routing)
        found = {name: each for part in self.group.gather(own) for name, each in part.items()}
        return dict(sorted(found.items(), key=lambda item: natural(item[0])))

    def _loader(self, dataset: Any, read_ahead: int) -> BatchLoader:
        return BatchLoader(
            dataset,
            self.run.train.global_batch_size,
            self.run.train.micro_batch_size,
            self.dp_rank,
            self.layout.dp_size,
            read_ahead=read_ahead,
            pin_memory=self.device.type == "cuda",
        )


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its configuration."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triptych", "numpy", "safetensors"):
        found[name] = importlib.metadata.version(name)
    return found


def _finite(loss: Sums, grad_norm: float) -> bool:
    return math.isfinite(loss.loss) and math.isfinite(grad_norm)


def _parallelize(run: RunSections, layout: Layout, device: torch.device) -> ParallelModel:
    config = run.train
    return parallelize(
        run.model,
        run.parallel,
        mesh=build_mesh(layout, device.type),
        device=device,
        dtype=PARAMETER_DTYPES[config.precision],
        seed=config.seed,
        seq_len=tokens_per_sample(run),
        micro_batch_size=config.micro_batch_size,
        num_micro_batches=config.global_batch_size // (layout.dp_size * config.micro_batch_size),
        autocast_dtype=torch.bfloat16 if config.precision == "bf16" else None,
        frozen=config.freeze,
    )


def _ensure_group(run: RunSections) -> bool:
    """Give a run of one rank the process group that meshes want; whether it was made here."""
    if dist.is_initialized() or run.parallel.world_size > 1:
        return False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return True
