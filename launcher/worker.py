"""What one rank does, the same under Ray Train, under torchrun and in-process.

torchrun --nproc-per-node 2 -m triptych.launcher.worker configs/lm/tiny.yaml parallel.tp=2
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from triptych.launcher import config as configuration
from triptych.launcher import rundir
from triptych.launcher.config import RunConfig
from triptych.launcher.errors import TopologyError, exit_code, is_meant, is_retryable
from triptych.launcher.progress import Display, step_line
from triptych.launcher.rundir import RunDir
from triptych.parallel.layout import Layout
from triptych.training import session as training

log = logging.getLogger("triptych.launcher.worker")

Report = Callable[..., None]
"""report(event, **values): rank 0's events, see launcher/progress.py."""


def run_worker(
    config: RunConfig, directory: RunDir, *, device: torch.device, node: str, display: Display | None = None
) -> int:
    """Train as this rank of the default process group; returns the exit code.

    Retryable errors propagate, so that the launcher restarts the workers; the others are recorded in the run
    directory's failure.json and end in an exit code. display: shows rank 0's events here as well.
    """
    rank = dist.get_rank()
    with _logged(directory, rank):
        try:
            restarted = _check_world(config, node, directory.was_started())
            _set_threads(config, device)
            log.info(
                "rank %d of %d, pid %d on %s, %s, %d threads; layout %s%s",
                rank,
                dist.get_world_size(),
                os.getpid(),
                socket.gethostname(),
                device,
                torch.get_num_threads(),
                Layout(config.parallel).coordinates(rank),
                "; takes the place of a worker that died" if restarted else "",
            )
            report = _reporter(directory, display)
            session = training.build(
                config,
                run_dir=directory.path,
                device=device,
                report=lambda step: report("step", **dataclasses.asdict(step)),
                restarted=restarted,
                meta=directory.last_start(),
            )
            if rank == 0:
                ranks = {"world_size": dist.get_world_size(), "device": str(device.type)}
                report("start", launch=directory.launches(), step=session.step, **ranks)
            session.fit()
            log.info("rank %d finished", rank)
            return 0
        except Exception as error:
            log.exception("rank %d failed", rank)
            if is_retryable(error):
                raise
            directory.record_failure(
                error, rank=rank, exit_code=exit_code(error), is_defect=not is_meant(error)
            )
            return exit_code(error)


def check_nodes(groups: Sequence[Sequence[int]], nodes: Sequence[str]) -> None:
    """Raises TopologyError when a tensor-parallel group spans nodes. nodes: the node of each rank."""
    for group in groups:
        places = {rank: nodes[rank] for rank in group}
        if len(set(places.values())) > 1:
            raise TopologyError(
                f"ranks {', '.join(map(str, group))} exchange activations within each layer "
                f"(parallel.tp={len(group)}) but were placed on several nodes: {places}; "
                "free whole nodes, or lower parallel.tp"
            )


def _check_world(config: RunConfig, node: str, restarted: bool) -> bool:
    """Check number and places of the ranks; returns what rank 0 says of `restarted`."""
    size = dist.get_world_size()
    if size != config.parallel.world_size:
        raise ValueError(
            f"the layout has {config.parallel.world_size} ranks but {size} processes run; "
            f"start {config.parallel.world_size}, or change the degrees under parallel:"
        )
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, (node, restarted))
    check_nodes(Layout(config.parallel).tensor_parallel_groups(), [place for place, _ in gathered])
    return bool(gathered[0][1])


def _set_threads(config: RunConfig, device: torch.device) -> None:
    """Workers on one node share its cores; more threads than cores make every one of them wait."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores // local))
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _reporter(directory: RunDir, display: Display | None) -> Report:
    def report(event: str, **values: Any) -> None:
        directory.event(event, **values)
        if event == "step":
            log.info("step %d  %s", values["step"], step_line(values))
        if display:
            display.show({"event": event, **values})

    return report


class _WarningEvents(logging.Handler):
    """Sends the rooms' warnings to the run's terminal, not only to the rank's log."""

    def __init__(self, directory: RunDir, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._directory, self._rank = directory, rank

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is None:  # a failure is told by the launcher, once
            with contextlib.suppress(OSError):
                self._directory.event("warning", text=f"rank {self._rank}: {record.getMessage()}")


@contextlib.contextmanager
def _logged(directory: RunDir, rank: int) -> Iterator[None]:
    """Our rooms' log records into logs/rank-<n>.log, their warnings to the terminal too."""
    directory.rank_log(rank).parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(directory.rank_log(rank))
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = _WarningEvents(directory, rank)
    ours = logging.getLogger("triptych")
    level, propagate = ours.level, ours.propagate
    ours.setLevel(logging.INFO)
    ours.propagate = False  # the root writes to standard error, which is the same file where it is redirected
    ours.addHandler(to_file)
    ours.addHandler(to_terminal)
    try:
        yield
    finally:
        ours.setLevel(level)
        ours.propagate = propagate
        ours.removeHandler(to_terminal)
        ours.removeHandler(to_file)
        to_file.close()


def redirect_output(directory: RunDir, rank: int) -> None:
    """Send standard output and error of this process, C++ included, to the rank's log from now on."""
    directory.rank_log(rank).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with directory.rank_log(rank).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run_in_process(config: RunConfig, directory: RunDir, display: Display) -> int:
    """Train in this very process, for debuggers; returns the exit code. The layout has one rank."""
    device = torch.device("cuda", 0) if uses_gpu(config) else torch.device("cpu")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        return run_worker(config, directory, device=device, node=socket.gethostname(), display=display)
    finally:
        dist.destroy_process_group()


def uses_gpu(config: RunConfig) -> bool:
    """Whether a worker on this machine takes a GPU. Raises RuntimeError when it must and there is none."""
    if config.cluster.use_gpu and not torch.cuda.is_available():
        raise RuntimeError(
            "cluster.use_gpu=true but torch sees no GPU here; run `triptych doctor`, or set it to false"
        )
    return torch.cuda.is_available() if config.cluster.use_gpu is None else config.cluster.use_gpu


def main(arguments: Sequence[str] | None = None) -> int:
    """`torchrun -m triptych.launcher.worker CONFIG [--run-dir DIR] [KEY=VALUE ...]`; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "RANK" not in os.environ:
        print("error: start this with torchrun, or use `triptych train`", file=sys.stderr)
        return 2
    try:
        run_dir = None
        if "--run-dir" in words:
            at = words.index("--run-dir")
            if at + 1 == len(words):
                raise ValueError("--run-dir needs a directory")
            _, run_dir = words.pop(at), words.pop(at)
        if not words:
            raise ValueError("no CONFIG given; for example configs/lm/tiny.yaml")
        config = configuration.load(words[0], words[1:])
        return _run_under_torchrun(config, run_dir)
    except Exception as error:
        if not is_meant(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)


def _run_under_torchrun(config: RunConfig, run_dir: str | None) -> int:
    if run_dir is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ValueError("torchrun --max-restarts needs --run-dir: a restart must find the run again")
    gpu = uses_gpu(config)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=config.cluster.collective_timeout)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
    try:
        directory = _agree_on_directory(config, run_dir)
        rank = dist.get_rank()
        # The copy keeps the terminal for rank 0's progress while everything else goes to the log.
        with open(os.dup(1), "w", encoding="utf-8") as terminal:
            console = Console(file=terminal, highlight=False, soft_wrap=True)
            redirect_output(directory, rank)
            display = Display(config.train.steps, console=console) if rank == 0 else None
            with display or contextlib.nullcontext():
                code = run_worker(
                    config, directory, device=device, node=socket.gethostname(), display=display
                )
            failure = directory.failure()
            if code and failure and failure["rank"] == rank:
                console.print(f"error: rank {rank}: {failure['message']}", markup=False)
            elif code == 0 and rank == 0:
                console.print(f"finished: {directory.path}", markup=False)
        return code
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _agree_on_directory(config: RunConfig, run_dir: str | None) -> RunDir:
    """Rank 0 chooses and prepares the run directory, the others take it."""
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        directory = rundir.plan(config, run_dir)
        # A restart by torchrun belongs to the launch before, see RunDir.was_started.
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            rundir.prepare(config, directory)
        chosen = [str(directory.path)]
    dist.broadcast_object_list(chosen, src=0)
    return RunDir(chosen[0])


if __name__ == "__main__":
    sys.exit(main())
