"""The directory of one run: what it was asked, by which versions, and what each rank said.

<run>/config.yaml      the resolved configuration (config-<n>.yaml: those of earlier starts that differ)
<run>/versions.json    versions, git revision, command line, one entry per start
<run>/progress.jsonl   events of rank 0 and of the launcher, which the terminal follows
<run>/logs/rank-<n>.log
<run>/failure.json     why the last start failed, if it did
<run>/checkpoints, metrics.jsonl, tensorboard: training writes them
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triptych.launcher.config import RunConfig, load

PACKAGES = (
    "triptych",
    "torch",
    "ray",
    "numpy",
    "pydantic",
    "safetensors",
    "tokenizers",
    "transformers",
    "triton",
)


class RunDir:
    """Paths and small files of one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def progress_file(self) -> Path:
        """Events, one JSON object a line."""
        return self.path / "progress.jsonl"

    @property
    def failure_file(self) -> Path:
        """Why the last start failed; absent when it did not."""
        return self.path / "failure.json"

    @property
    def checkpoints(self) -> Path:
        """Where training keeps its checkpoints."""
        return self.path / "checkpoints"

    def rank_log(self, rank: int) -> Path:
        """What the process of one rank wrote to its standard output and error."""
        return self.path / "logs" / f"rank-{rank}.log"

    def latest_checkpoint(self) -> str | None:
        """Name of the newest committed checkpoint, as the pointer says; None before the first."""
        with contextlib.suppress(OSError):
            return (self.checkpoints / "latest").read_text().strip() or None
        return None

    def event(self, event: str, **values: Any) -> None:
        """Append one event to progress.jsonl: a single write, so that writers do not mix."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, default=str) + "\n"
        with _event_lock, self.progress_file.open("a", encoding="utf-8") as file:
            file.write(line)

    def record_failure(
        self, error: BaseException, *, rank: int, exit_code: int, is_defect: bool = False
    ) -> None:
        """Write failure.json. The first rank to fail is kept: the others fail because of it."""
        record = {
            "type": type(error).__name__,
            "message": f"{type(error).__name__}: {error}" if is_defect else str(error),
            "is_defect": is_defect,
            "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
            "rank": rank,
            "exit_code": exit_code,
            "time": time.time(),
        }
        temporary = self.failure_file.with_name(f".failure-{rank}-{os.getpid()}.json")
        temporary.write_text(json.dumps(record, indent=2), encoding="utf-8")
        try:
            os.link(temporary, self.failure_file)  # atomic, and refuses to replace
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(temporary, self.failure_file)
        temporary.unlink(missing_ok=True)

    def failure(self) -> dict[str, Any] | None:
        """The contents of failure.json, or None."""
        try:
            return json.loads(self.failure_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def starts(self) -> list[dict[str, Any]]:
        """The entries of versions.json, one per launch."""
        try:
            return json.loads((self.path / "versions.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []

    def launches(self) -> int:
        """How often a launcher has prepared this directory."""
        return len(self.starts())

    def last_start(self) -> dict[str, Any]:
        """The newest entry of versions.json."""
        return self.starts()[-1]

    def was_started(self) -> bool:
        """Whether the workers of this launch have trained before: they died and these take their place."""
        launch = self.launches()
        return any(event.get("event") == "start" and event.get("launch") == launch for event in self.events())

    def events(self) -> Iterator[dict[str, Any]]:
        """The readable lines of progress.jsonl."""
        if self.progress_file.exists():
            for line in self.progress_file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and hold it for one launcher. Raises ValueError while another one has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another triptych is training in {self.path}; wait for it, or give another --run-dir"
                ) from None
            except OSError:
                pass  # a file system without locks; two launchers in one directory are then the user's care
            yield


_event_lock = threading.Lock()


def plan(config: RunConfig, run_dir: str | Path | None = None) -> RunDir:
    """The directory a run would take: `run_dir`, or a fresh runs/<name>-<time>. Nothing is created."""
    if run_dir is not None:
        directory = RunDir(run_dir)
        if directory.path.exists() and not directory.path.is_dir():
            raise ValueError(f"--run-dir {run_dir} is a file; give a directory")
        return directory
    stem = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stem if number == 0 else f"{stem}-{number}" for number in range(1000))
    return RunDir(next(path for path in (Path("runs") / name for name in names) if not path.exists()))


def prepare(config: RunConfig, directory: RunDir) -> list[str]:
    """Create `directory`, or reuse it for a resumed run, and save configuration and versions.

    Returns the keys in which the configuration differs from the one this directory had.
    """
    (directory.path / "logs").mkdir(parents=True, exist_ok=True)
    changed: list[str] = []
    if directory.config_file.exists():
        before = directory.config_file.read_text(encoding="utf-8")
        changed = _changed_keys(directory.config_file, config)
        if changed:
            number = len(list(directory.path.glob("config-*.yaml"))) + 1
            (directory.path / f"config-{number}.yaml").write_text(before, encoding="utf-8")
    _write(directory.config_file, config.to_yaml())
    directory.failure_file.unlink(missing_ok=True)
    _write(directory.path / "versions.json", json.dumps([*directory.starts(), versions()], indent=2))
    return changed


def versions() -> dict[str, Any]:
    """What a run depends on besides its configuration: versions, git revision, machine, command line."""
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "directory": os.getcwd(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": installed,
        "git": git_revision(),
    }


def git_revision() -> dict[str, Any] | None:
    """Commit of the checkout that triptych is imported from, and whether files differ; None without one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # In a virtual environment below somebody else's checkout, that checkout is not ours.
        git("ls-files", "--error-unmatch", "rundir.py")
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _changed_keys(config_file: Path, config: RunConfig) -> list[str]:
    try:
        before = load(config_file).to_dict()
    except ValueError:
        return ["(the earlier config.yaml cannot be read any more)"]
    old, new = dict(_flat(before)), dict(_flat(config.to_dict()))
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
