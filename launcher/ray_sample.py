"""`triptych sample` of a diffusion run: in this process, or dealt out to Ray workers."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from triptych.launcher import ray_settings
from triptych.launcher.errors import RunFailed
from triptych.launcher.signals import sigterm_raises
from triptych.tools.image_drawer import Drawer, Job
from triptych.tools.images import Array
from triptych.tools.sample_images import Execute, SampleReport, in_process, sample_images

AHEAD = 2
"""Batches that a worker has been given and not handed over: it draws one while another is written."""


def sample(path: str | Path, *, workers: int = 1, address: str | None = None, **options: Any) -> SampleReport:
    """`tools.sample_images.sample_images` with `options`, on `workers` Ray workers, with a progress bar.

    workers: 1 draws in this process, without Ray. More take one CPU each, or one GPU each with device cuda.
    address: Ray cluster to join; None: RAY_ADDRESS, else a Ray that is started and stopped with this call.
    Raises ValueError for bad options, RunFailed when a worker failed, and what `sample_images` raises.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    if workers > 1 and options.get("device", "cpu") not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {options['device']}: each of several workers has a GPU of its own; use --device cuda"
        )
    execute = in_process if workers == 1 else _on_ray(workers, address)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with sigterm_raises(), Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("drawing", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return sample_images(path, execute=execute, workers=workers, progress=progress, **options)


def _on_ray(workers: int, address: str | None) -> Execute:
    """What draws a job on Ray workers."""
    join = address or os.environ.get("RAY_ADDRESS") or None

    def execute(job: Job) -> Generator[Array, None, None]:
        ray_settings.apply(join)
        from triptych.launcher.ray_cluster import cluster, local_options

        local = local_options(workers, use_gpu=None if job.device == "cuda" else False)
        with cluster(join, local, logs=job.checkpoint.parents[1] / "logs"):
            yield from _fan_out(job, workers)

    return execute


class Worker:
    """One Ray worker: holds the model, draws what it is told."""

    drawer: ClassVar[type[Drawer]] = Drawer

    def load(self, job: Job, threads: int) -> None:
        """Read the checkpoint. Not done in the constructor, whose errors Ray wraps beyond recognition."""
        import torch

        torch.set_num_threads(threads)
        self._drawer = self.drawer(job)

    def draw(self, numbers: range) -> Array:
        """The samples of these numbers."""
        return self._drawer.draw(numbers)


def _fan_out(job: Job, workers: int) -> Generator[Array, None, None]:
    """Deal the batches to `workers` actors in turn; yields what they drew in the batches' order."""
    import ray

    from triptych.launcher.ray_cluster import check_free

    batches = job.batches()
    workers = min(workers, len(batches))
    needs = {"CPU": 1.0, "GPU": 1.0} if job.device == "cuda" else {"CPU": 1.0}
    check_free(needs, workers, ray.available_resources())
    # Ray's annotations know no class that is made remote by a call.
    remote: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))
    actors = [remote(Worker).remote() for _ in range(workers)]
    threads = max(1, (os.cpu_count() or 1) // workers)
    try:
        loading = [actor.load.remote(job, threads) for actor in actors]
        for number, reference in enumerate(loading):
            _result(reference, number, "the checkpoint was read")
        given: deque[tuple[int, range, Any]] = deque()
        for place, numbers in enumerate(batches):
            number = place % workers
            given.append((number, numbers, actors[number].draw.remote(numbers)))
            if len(given) == AHEAD * workers:
                yield _drawn(*given.popleft())
        while given:
            yield _drawn(*given.popleft())
    finally:
        for actor in actors:
            ray.kill(actor)


def _drawn(number: int, numbers: range, reference: Any) -> Array:
    return _result(reference, number, f"samples {numbers.start} to {numbers.stop - 1} were drawn")


def _result(reference: Any, number: int, done: str) -> Any:
    """What a worker returned. Raises RunFailed, saying what to do, if it failed."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise RunFailed(
            f"worker {number} died (killed, crashed, or out of memory) before {done}; nothing was written. "
            "Try again with fewer --workers or a smaller --batch-size",
            details=str(error),
        ) from error
    except ray.exceptions.RayTaskError as error:
        meant = isinstance(error.cause, ValueError | RuntimeError | OSError | MemoryError)
        raise RunFailed(
            f"worker {number} failed before {done}: {error.cause}", details=str(error), is_defect=not meant
        ) from error
