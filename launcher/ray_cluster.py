"""A Ray for a command: the one to join, or one of our own that is started and stopped with it."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from triptych.launcher import processes
from triptych.launcher.errors import Terminated

OBJECT_STORE_BYTES = 128 * 2**20
LONGEST_TEMP_DIR = 30
"""Characters: Ray adds about 75 for its sockets, and a socket's path may have 107."""


@contextlib.contextmanager
def cluster(join: str | None, local: Mapping[str, Any], logs: Path) -> Iterator[None]:
    """Join the cluster at `join`, or start one here with the options `local` of ray.init; undo it at the end.

    logs: where a Ray of our own leaves its logs when something failed. Raises ValueError when no cluster
    answers, RuntimeError when there is no place for sockets.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if join:
        try:
            _init(address=join, **quiet)
        except (ConnectionError, ValueError, OSError) as error:
            raise ValueError(
                f"cluster.address={join!r}: no Ray cluster answers there ({error}); give the address that "
                "`ray start` printed, and set RAY_AUTH_MODE=token if the cluster asks for a token"
            ) from error
        try:
            yield
        finally:
            with _undisturbed():
                ray.shutdown()
        return
    temporary = Path(tempfile.mkdtemp(prefix="tri-", dir=short_temp_dir()))
    before = set(processes.descendants())
    try:
        _init(address="local", **quiet, **local, _temp_dir=str(temporary))
        yield
    except Exception:
        _keep_logs(temporary, logs)
        raise
    finally:
        with _undisturbed():
            started = [process for process in processes.descendants() if process not in before]
            ray.shutdown()
            # A worker that was only just starting hangs below nobody any more; its arguments name it.
            processes.end([*started, *processes.mentioning(str(temporary))])
            shutil.rmtree(temporary, ignore_errors=True)


def _init(**options: Any) -> None:
    """ray.init, without the SIGTERM handler that it leaves behind: ours unwinds and clears up."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as error:  # Ray's own handler, while it starts
        raise Terminated from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not break off the clearing up after the first; it takes a second or two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def local_options(
    workers: int,
    cpus_per_worker: float = 1.0,
    resources_per_worker: Mapping[str, float] | None = None,
    use_gpu: bool | None = None,
) -> dict[str, Any]:
    """Logical CPUs and resources for every worker, whatever the machine has; GPUs are counted by Ray."""
    options: dict[str, Any] = {
        "num_cpus": max(1, -(-workers * cpus_per_worker // 1)),
        "resources": {name: workers * amount for name, amount in (resources_per_worker or {}).items()},
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    if use_gpu is False:
        options["num_gpus"] = 0
    return options


def check_free(needs: Mapping[str, float], workers: int, available: Mapping[str, float]) -> None:
    """Raises ValueError when others hold what the workers need: it would wait for them without a word."""
    for name, amount in needs.items():
        if workers * amount > available.get(name, 0) + 1e-6:
            free = available.get(name, 0)
            raise ValueError(
                f"{workers} workers need {workers * amount:g} {name}, but {free:g} are free in the cluster "
                "now; wait for the other jobs, or use fewer workers"
            )


def short_temp_dir() -> str:
    """A directory for Ray's sockets whose name is short enough. Raises RuntimeError if there is none."""
    candidates = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp", "/var/tmp"]
    for candidate in candidates:
        if candidate and len(candidate) <= LONGEST_TEMP_DIR and os.access(candidate, os.W_OK):
            return candidate
    raise RuntimeError(
        f"no temporary directory for Ray's sockets: {', '.join(filter(None, candidates))} are not writable "
        f"or longer than {LONGEST_TEMP_DIR} characters; set RAY_TMPDIR to a short one"
    )


def _keep_logs(temporary: Path, logs: Path) -> None:
    """Ray's own logs of a failed run, beside those of the ranks."""
    with contextlib.suppress(OSError, shutil.Error):
        for session in temporary.glob("session_2*/logs"):
            shutil.copytree(session, logs / "ray" / f"{datetime.datetime.now():%Y%m%d-%H%M%S}")
