"""A directory of checkpoints: which are there, which are valid, which stay.

<root>/step-00000100/    rank-00000.safetensors ...  each rank's windows (training/shards.py)
                         index.json      tensor name -> whole shape, dtype, chunks
                         state.json      step, consumed samples, configuration, versions
                         manifest.json   size and SHA-256 of each file above
                         COMMITTED       SHA-256 of manifest.json; written last
<root>/latest            name of the newest committed checkpoint
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from triptych.training.group import Group
from triptych.training.shards import Reader, index_from_json

log = logging.getLogger("triptych.training.checkpoint")

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_HASH_BYTES = 16 * 2**20


def list_steps(root: Path) -> list[Path]:
    """The checkpoint directories under `root`, newest first, valid or not."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is meant as one checkpoint, valid or not."""
    return bool(_NAME.fullmatch(directory.name)) or (directory / "COMMITTED").is_file()


def problem(directory: Path, rank: int = 0, size: int = 1) -> str | None:
    """What makes `directory` no valid checkpoint, naming the file; None if nothing does.

    The work of reading all files is divided: this is the verdict of `rank` of `size`.
    """
    marker, manifest_path = directory / "COMMITTED", directory / "manifest.json"
    try:
        if not marker.is_file():
            return "the marker COMMITTED is missing: it was never finished"
        if not manifest_path.is_file():
            return "manifest.json is missing"
        text = manifest_path.read_text()
        if marker.read_text() != sha256(text):
            return "manifest.json differs from what COMMITTED recorded"
        manifest = json.loads(text)
        if manifest["version"] > FORMAT_VERSION:
            return f"its format version {manifest['version']} is newer than this program's {FORMAT_VERSION}"
        for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if number % size == rank and _file_sha256(path) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, UnicodeDecodeError) as error:
        return f"unreadable: {error}"
    return None


def shared_problem(directory: Path, group: Group) -> str | None:
    """`problem` with the reading divided among the ranks; the same verdict on all of them."""
    verdicts = group.gather(problem(directory, group.rank, group.size))
    return next((verdict for verdict in verdicts if verdict), None)


def find_latest(root: Path, group: Group | None = None) -> Path | None:
    """The newest valid checkpoint under `root`; None if there is none at all. A collective call.

    Every invalid one that is newer is named in a warning. Raises ValueError if there are some but none is
    valid.
    """
    group = group or Group()
    candidates = group.broadcast(list_steps(root))
    problems = []
    for directory in candidates:
        verdict = shared_problem(directory, group)
        if verdict is None:
            return directory
        problems.append(f"{directory}: {verdict}")
        if group.rank == 0:
            log.warning("CHECKPOINT NOT USABLE, taking the one before: %s: %s", directory, verdict)
    if problems:
        raise ValueError(
            "no checkpoint is valid: "
            + "; ".join(problems)
            + ". Start afresh in another run directory, or resume another run with checkpoint.resume=PATH"
        )
    return None


def load_state(directory: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return json.loads((directory / "state.json").read_text())


def open_reader(directory: Path) -> Reader:
    """A reader of the tensors of a checkpoint; use it as a context manager."""
    return Reader(directory, index_from_json(json.loads((directory / "index.json").read_text())))


def retain(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints; the one that `latest` names always stays."""
    pointer = root / "latest"
    named = pointer.read_text().strip() if pointer.is_file() else None
    for directory in list_steps(root)[keep:]:
        if directory.name != named:
            remove(directory)


def set_aside(directory: Path, why: str) -> Path:
    """Rename a checkpoint so that it no longer counts as one, keeping its files; returns the new path."""
    number = 0
    while True:
        target = directory.with_name(f"{directory.name}.{why}" + (f".{number}" if number else ""))
        if not target.exists():
            directory.rename(target)
            return target
        number += 1


def remove_leftovers(root: Path) -> None:
    """Remove the temporary directories of saves that a dead process left."""
    for pattern in (".tmp-*", ".trash-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def remove(directory: Path) -> None:
    """Remove a checkpoint. It is renamed first: a kill half-way through leaves no torn one behind."""
    trash = directory.with_name(f".trash-{directory.name}-{uuid.uuid4().hex[:8]}")
    directory.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either absent or whole, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(text: str) -> str:
    """Checksum of a small text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
