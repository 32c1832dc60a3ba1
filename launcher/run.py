"""`triptych train` and `triptych data text` from their options to their result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from triptych.launcher import ray_settings, rundir
from triptych.launcher.config import RunConfig, load
from triptych.launcher.errors import RunFailed, Terminated
from triptych.launcher.progress import Display, duration
from triptych.launcher.rundir import RunDir
from triptych.launcher.signals import sigterm_raises


def resolve(
    words: Sequence[str],
    *,
    run_dir: Path | None = None,
    resume: Path | None = None,
    address: str | None = None,
) -> tuple[RunConfig, RunDir]:
    """The configuration and the run directory that the options of `triptych train` mean; nothing is created.

    Raises ValueError for options that contradict each other and for what `config.load` refuses.
    """
    overrides = [f"cluster.address={json.dumps(address)}"] if address else []
    if resume is None:
        if not words or "=" in words[0]:
            raise ValueError(
                "no CONFIG given; for example `triptych train configs/lm/demo.yaml`, or --resume RUN_DIR"
            )
        config = load(words[0], [*words[1:], *overrides])
        return config, rundir.plan(config, run_dir)
    if run_dir is not None:
        raise ValueError("--resume names the run directory already; leave --run-dir out")
    if words and "=" not in words[0]:
        raise ValueError(
            f"--resume takes the configuration of {resume}; leave {words[0]} out, give overrides only"
        )
    directory = RunDir(resume)
    if not directory.config_file.is_file():
        raise ValueError(
            f"--resume {resume}: there is no config.yaml; give a directory that `triptych train` made"
        )
    # What the run was first started from (never, or a path) is history.
    return load(directory.path, ["checkpoint.resume=auto", *words, *overrides]), directory


def preflight(config: RunConfig, *, in_process: bool = False) -> None:
    """Raises ValueError, before any process is started, for a layout or a corpus that cannot serve."""
    from triptych.training.check import check
    from triptych.training.data import open_training, open_validation

    if in_process and config.parallel.world_size != 1:
        raise ValueError(
            f"--in-process runs one rank but the layout has {config.parallel.world_size}; "
            "leave --in-process out, or set the degrees under parallel: to 1"
        )
    check(config)
    open_training(config)
    open_validation(config)


def show_plan(config: RunConfig, directory: RunDir) -> None:
    """What `triptych train` would do: the description of the run and its directory."""
    from triptych.tools.describe import describe

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(describe(config).table())
    again = "resumed in" if directory.config_file.exists() else "in"
    console.print(f"dry run: nothing was started; it would run {again} {directory.path}", markup=False)


def train(config: RunConfig, directory: RunDir, *, in_process: bool = False) -> dict[str, Any]:
    """Train to the end in `directory`; returns the numbers of the end.

    Raises RunFailed, ValueError for a cluster that is too small or a directory in use, and lets
    KeyboardInterrupt and Terminated through after saying how to go on.
    """
    started = time.monotonic()
    with directory.locked():
        changed = rundir.prepare(config, directory)
        display = Display(config.train.steps, max_failures=config.cluster.max_failures)
        display.note(f"run directory: {directory.path}")
        if changed:
            display.note(
                f"differs from the last start of this directory: {', '.join(changed)}", style="yellow"
            )
        try:
            with sigterm_raises(), display:
                _launch(config, directory, display, in_process)
        except (KeyboardInterrupt, Terminated):
            display.note(_how_to_go_on(directory), style="bold")
            raise
        except RunFailed as error:
            message = f"{error}\n{_how_to_go_on(directory)}"
            raise RunFailed(message, error.exit_code, error.details, error.is_defect) from error
    seconds = time.monotonic() - started
    if not display.last:
        done = f"{directory.latest_checkpoint()} has all {config.train.steps} steps"
        display.note(f"nothing to do: {done}; raise train.steps to go on", style="yellow")
    display.note(
        f"finished in {duration(seconds)}: {directory.path} (checkpoint {directory.latest_checkpoint()})"
    )
    return {
        "run_dir": str(directory.path),
        "checkpoint": directory.latest_checkpoint(),
        "step": display.last.get("step", config.train.steps),
        "loss": display.last.get("loss"),
        "valid_loss": display.valid_loss,
        "restarts": max(0, display.starts - 1),
        "seconds": round(seconds, 1),
    }


def _launch(config: RunConfig, directory: RunDir, display: Display, in_process: bool) -> None:
    if not in_process:
        ray_settings.apply(ray_settings.address(config))
        from triptych.launcher import ray_train

        ray_train.train(config, directory, display)
        return
    from triptych.launcher.worker import run_in_process

    code = run_in_process(config, directory, display)
    failure = directory.failure()
    if code and failure:
        raise RunFailed.of(failure)


def _how_to_go_on(directory: RunDir) -> str:
    checkpoint = directory.latest_checkpoint()
    if checkpoint is None:
        return f"no checkpoint was committed yet; logs are in {directory.path / 'logs'}"
    there = directory.checkpoints / checkpoint
    return f"last checkpoint: {there}; go on with: triptych train --resume {directory.path}"
