"""The processes below this one, so that what we started is gone when we say so. Elsewhere than on Linux, none
are seen.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

Process = tuple[int, str]
"""(pid, start time): the pair is never used twice, a pid alone is."""


def descendants(root: int | None = None) -> list[Process]:
    """The live processes below `root` (this process), children before grandchildren."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        status = _status(int(entry.name))
        if status:
            parent, start = status
            children.setdefault(parent, []).append((int(entry.name), start))
    found: list[Process] = []
    queue = [os.getpid() if root is None else root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += [pid for pid, _ in below]
    return found


def mentioning(text: str) -> list[Process]:
    """The live processes with `text` in their command line, wherever they hang in the tree."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                status = _status(int(entry.name))
                found += [(int(entry.name), status[1])] if status else []
    return found


def end(processes: list[Process], patience: float = 3.0) -> None:
    """Wait until `processes` are gone; kill those that are still there after `patience` seconds."""
    deadline = time.monotonic() + patience
    while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def is_alive(process: Process) -> bool:
    """Whether this very process still runs; a zombie does not."""
    status = _status(process[0])
    return status is not None and status[1] == process[1]


def _status(pid: int) -> tuple[int, str] | None:
    """(parent's pid, start time) of a live process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command's name may hold blanks and brackets
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])
