"""Images from a checkpoint: `triptych sample` of a diffusion run.

Shape legend: B samples of a batch, C channels, H and W pixels, h and w of what the model draws.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError

from triptych import models
from triptych.data_pipeline.kinds import read_config as read_data
from triptych.models import DiffusionConfig
from triptych.tools.image_drawer import Drawer, Job
from triptych.tools.images import Array, NpzWriter
from triptych.tools.render import table_of
from triptych.training import recovery, store
from triptych.training.conditions import Conditions, conditions
from triptych.training.config import LogConfig, TrainConfig
from triptych.training.decoding import check_vae, shows_pixels
from triptych.training.loading import averages_wanted
from triptych.training.pictures import grid, latents_to_uint8, write_png
from triptych.training.sampling import Denoiser, SamplerConfig
from triptych.training.sampling.draw import check_sampler
from triptych.training.session import versions

if TYPE_CHECKING:
    from rich.console import RenderableType

GRID_COUNT = 100
"""Samples in samples.png, at most."""
GRID_COLUMNS = 10
# Keys of a sampler that belong to its method.
_OF_METHOD = ("eta", "diffusion", "diffusion_scale", "last_step")

Execute = Callable[[Job], Generator[Array, None, None]]
"""Draws the batches of a job, one after the other in their order."""
Progress = Callable[[int, int], None]
"""Called with (samples drawn, samples in all)."""


@dataclass(frozen=True)
class SampleReport:
    """What was drawn and how; also the sidecar samples.json."""

    conditions: dict[str, Any]
    """Everything that the samples depend on, as JSON values."""
    files: dict[str, str]
    """Paths of the grid, the samples and the sidecar; none in a dry run."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {**self.conditions, "files": self.files, "seconds": round(self.seconds, 1)}

    def table(self) -> RenderableType:
        """The main conditions and the files as a rich renderable."""
        told = self.conditions
        sampler = told["sampler"]
        guidance = sampler["guidance"]
        rows = [
            ["checkpoint", told["checkpoint"]],
            ["weights", told["weights"]],
            ["images", f"{told['num']} of {' x '.join(map(str, told['size']))}, seed {sampler['seed']}"],
            ["sampler", f"{sampler['method']}, {sampler['steps']} steps"],
            ["guidance", _guidance_text(guidance)],
            ["classes", told["classes"]["text"] if told["classes"] else "none"],
            *([name, path] for name, path in self.files.items()),
        ]
        if told["note"]:
            rows.append(["note", told["note"]])
        return table_of(f"Step {told['step']}", ["what", "value"], rows)


def in_process(job: Job) -> Generator[Array, None, None]:
    """Draw the batches of a job here, one after the other."""
    drawer = Drawer(job)
    for numbers in job.batches():
        yield drawer.draw(numbers)


def sample_images(
    path: str | Path,
    *,
    num: int = 64,
    labels: Sequence[int] | None = None,
    texts: str | Path | None = None,
    sampler: Mapping[str, Any] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    ema: bool | None = None,
    vae: str | Path | None = None,
    out: str | Path | None = None,
    execute: Execute = in_process,
    workers: int = 1,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> SampleReport:
    """Draw `num` images from a run's newest checkpoint, or from one checkpoint, of any layout.

    Sample n is a function of the checkpoint, the sampler with its seed, the size and n; its label is
    labels[n % len(labels)], None taking all classes in turn. It depends neither on the batch size nor on
    who draws it. Written to the directory `out` (default: <run>/samples/step-<step>) are samples.png, a grid
    of the first 100; samples.npz (tools/images.py); and last samples.json, the conditions. All three are
    called latents.* where there is nothing to decode latents with.

    texts: a .npy of embedded texts for models that read them. sampler: keys of `SamplerConfig` over those of
    the run's log.images.sampler, guidance as a mapping. size: (h, w) of what the model draws, other than its
    own with position: rope. ema: with the averaged parameters; None: where there are any. vae: directory of
    the AutoencoderKL that decodes latents; without it they are written as they are.
    execute: who draws; workers: how many it says it has. dry_run: check everything, draw nothing.
    Raises ValueError for what the arguments get wrong, RuntimeError for a diverging model, OSError for a
    file system that refuses.
    """
    started = time.monotonic()
    run = _Run.read(path)
    job = _job(run, num, labels, texts, sampler, size, batch_size, device, ema, vae)
    told = _conditions(run, job, workers)
    if dry_run:
        return SampleReport(told, {}, 0.0)
    directory = Path(out).expanduser() if out is not None else _default_directory(run)
    directory.mkdir(parents=True, exist_ok=True)
    stem = "samples" if vae is not None or shows_pixels(run.data) else "latents"
    # Never does a sidecar describe other samples than those beside it.
    sidecar = directory / f"{stem}.json"
    sidecar.unlink(missing_ok=True)
    paths = {"grid": directory / f"{stem}.png", "samples": directory / f"{stem}.npz"}
    with closing(execute(job)) as batches:
        _write(job, batches, paths["samples"], paths["grid"], progress)
    files = {name: str(path) for name, path in {**paths, "conditions": sidecar}.items()}
    report = SampleReport(told, files, time.monotonic() - started)
    store.write_text(sidecar, json.dumps(report.to_json(), indent=2) + "\n")
    return report


@dataclass(frozen=True)
class _Run:
    """A checkpoint of a diffusion run, and what it says of itself."""

    checkpoint: Path
    state: dict[str, Any]
    model: DiffusionConfig
    train: TrainConfig
    data: Any
    log: LogConfig

    @classmethod
    def read(cls, path: str | Path) -> _Run:
        place = Path(path).expanduser()
        if not place.exists():
            raise ValueError(f"{path} does not exist; give a run directory or a checkpoint in it")
        checkpoint = recovery.newest_in(place)
        state = store.load_state(checkpoint)
        config = state["config"]
        model = models.read_config(config["model"])
        if not isinstance(model, DiffusionConfig):
            raise ValueError(f"{path} is of model.family={model.family}; images come from family diffusion")
        if len(model.input_size) != 2:
            raise ValueError(
                f"model.input_size={list(model.input_size)} of {path} has {len(model.input_size)} "
                "dimension(s); samples are written as images, of two"
            )
        train, log = TrainConfig.model_validate(config["train"]), LogConfig.model_validate(config["log"])
        return cls(checkpoint, state, model, train, read_data(config["data"]), log)


def _job(
    run: _Run,
    num: int,
    labels: Sequence[int] | None,
    texts: str | Path | None,
    sampler: Mapping[str, Any] | None,
    size: tuple[int, int] | None,
    batch_size: int,
    device: str,
    ema: bool | None,
    vae: str | Path | None,
) -> Job:
    """The arguments of `sample_images`, checked against the run."""
    for name, value in (("--num", num), ("--batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device} was asked for, but PyTorch sees no CUDA device here; use cpu")
    if vae is not None:
        check_vae(vae, run.data)
    return Job(
        checkpoint=run.checkpoint.resolve(),
        ema=averages_wanted(run.checkpoint, ema),
        device=device,
        sampler=_sampler(run, sampler or {}),
        conditions=conditions(run.model.conditioning, labels, texts),
        num=num,
        batch_size=min(batch_size, num),
        size=_size(run.model, size),
        vae=None if vae is None else str(Path(vae).expanduser().resolve()),
    )


def _sampler(run: _Run, changes: Mapping[str, Any]) -> SamplerConfig:
    """`changes` over the sampler of the run's own grids, if it drew any."""
    base = (run.log.images.sampler if run.log.images else SamplerConfig()).model_dump()
    if changes.get("method", base["method"]) != base["method"]:
        base = {key: value for key, value in base.items() if key not in _OF_METHOD}
    guidance = {**base["guidance"], **changes.get("guidance", {})}
    try:
        config = SamplerConfig.model_validate({**base, **changes, "guidance": guidance})
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ValueError(f"the sampler cannot be used: {'; '.join(wrong)}") from error

    def never(batch: dict[str, Any]) -> torch.Tensor:
        raise AssertionError("nothing is predicted while options are checked")

    check_sampler(config, Denoiser(run.train.objective, run.model, never))
    if config.guidance.scale != 1 and run.train.objective.label_drop == 0:
        raise ValueError(
            f"guidance.scale={config.guidance.scale} needs a model that was also trained without labels, and "
            "train.objective.label_drop=0; use 1, or train with label_drop=0.1"
        )
    return config


def _size(model: DiffusionConfig, size: tuple[int, int] | None) -> tuple[int, ...]:
    if size is None or tuple(size) == model.input_size:
        return model.input_size
    told = "x".join(map(str, size))
    if model.position != "rope":
        raise ValueError(
            f"--size {told}: a model with model.position={model.position} draws its own size only, "
            f"{'x'.join(map(str, model.input_size))}; leave --size out (position: rope serves other sizes)"
        )
    if min(size) < 1 or any(edge % model.patch_size for edge in size):
        raise ValueError(
            f"--size {told} is not divisible by model.patch_size={model.patch_size}; use multiples of it"
        )
    return tuple(size)


def _write(
    job: Job, batches: Generator[Array, None, None], samples: Path, picture: Path, progress: Progress | None
) -> None:
    """Write the samples as they come, and the grid."""
    if progress is not None:
        progress(0, job.num)
    # The first batch tells what shape samples have.
    first = next(batches)
    labels = None
    if job.conditions.labels:
        labels = job.conditions.labels_of(torch.arange(job.num)).numpy()
    shown: list[Array] = []
    with NpzWriter(samples, (job.num, *first.shape[1:]), first.dtype, labels) as writer:
        for batch in chain([first], batches):
            writer.write(batch)
            if len(shown) < GRID_COUNT:
                shown += list(batch[: GRID_COUNT - len(shown)])
            if progress is not None:
                progress(writer.written, job.num)
    pictures = np.stack(shown)
    if pictures.dtype != np.uint8:
        pictures = latents_to_uint8(torch.from_numpy(pictures))
    write_png(picture, grid(pictures, GRID_COLUMNS), [("checkpoint", str(job.checkpoint))])


def _default_directory(run: _Run) -> Path:
    root = run.checkpoint.resolve().parent
    root = root.parent if root.name == recovery.CHECKPOINTS else root
    return root / "samples" / f"step-{run.state['step']:08d}"


def _conditions(run: _Run, job: Job, workers: int) -> dict[str, Any]:
    """What the numbers made from the samples are to be told with."""
    average = run.train.ema if job.ema else None
    note = ""
    if job.vae is None and not shows_pixels(run.data):
        note = (
            "latents as the model draws them, float32 (C, h, w), scaled; give --vae for pictures. The grid "
            "shows their first three channels"
        )
    return {
        "checkpoint": str(job.checkpoint),
        "step": run.state["step"],
        "weights": f"EMA, decay {average.decay}" if average else "the parameters themselves",
        "ema": average.model_dump(mode="json") if average else None,
        "objective": run.train.objective.model_dump(mode="json"),
        "sampler": job.sampler.model_dump(mode="json"),
        "num": job.num,
        "size": list(job.size),
        "classes": _balance(job.conditions, job.num),
        "texts": None if job.conditions.texts is None else len(job.conditions.texts),
        "vae": _vae(run, job),
        "precision": run.train.precision,
        "device": job.device,
        "batch_size": job.batch_size,
        "workers": workers,
        "note": note,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _vae(run: _Run, job: Job) -> dict[str, Any] | None:
    if job.vae is None:
        return None
    factor, shift = check_vae(job.vae, run.data)
    return {"path": job.vae, "scale_factor": factor, "shift_factor": shift}


def _balance(told: Conditions, num: int) -> dict[str, Any] | None:
    """How many samples each class has; labels are listed where they are few."""
    if not told.labels:
        return None
    counts = torch.bincount(told.labels_of(torch.arange(num)), minlength=max(told.labels) + 1)
    counts = counts[sorted(set(told.labels))]
    least, most = int(counts.min()), int(counts.max())
    each = str(least) if least == most else f"{least} to {most}"
    return {
        "text": f"{len(counts)}, with {each} samples each",
        "labels": list(told.labels) if len(told.labels) <= GRID_COUNT else None,
        "fewest": least,
        "most": most,
    }


def _guidance_text(guidance: Mapping[str, Any]) -> str:
    if guidance["scale"] == 1:
        return "none"
    text = f"scale {guidance['scale']:g}"
    if guidance["interval"] is not None:
        text += " for t from {:g} to {:g}".format(*guidance["interval"])
    return text + (f", first {guidance['channels']} channels" if guidance["channels"] else "")
