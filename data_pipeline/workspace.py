"""Directories that appear whole or not at all: built beside their place under a lock, then renamed."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_builder(out: Path) -> Iterator[None]:
    """Serialises builders of one `out`; the second then finds what the first has built."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f".{out.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever made these holds no lock any more: it was killed.
        for neighbour in out.parent.iterdir():
            if neighbour.name.startswith(_prefix(out)):
                shutil.rmtree(neighbour, ignore_errors=True)
        yield


@contextmanager
def replacement(out: Path) -> Iterator[Path]:
    """An empty directory, which becomes `out` (in place of what was there) when the block ends without
    error."""
    workspace = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
    try:
        yield workspace
        workspace.chmod(0o755)
        if out.exists():
            retired = workspace.with_name(workspace.name + "-old")
            out.rename(retired)
            workspace.rename(out)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            workspace.rename(out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.building-"
