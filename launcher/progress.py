"""What the terminal shows of a run: a live line on a terminal, plain lines elsewhere.

Rank 0 and the launcher append events to <run>/progress.jsonl; whoever shows them follows that file, so it
makes no difference which machine rank 0 is on as long as the run directory is shared.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_SECONDS = 2.0
"""Shortest time between two plain step lines; the last step is always shown."""

Event = dict[str, Any]


class Tail:
    """Follows a file of JSON lines from where it ends now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def read(self) -> list[Event]:
        """The events that became complete since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # a writer was killed in the middle of its line
        return events


class Display:
    """Shows events; a context manager, because a live line must be taken down."""

    def __init__(self, steps: int, *, max_failures: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=False, highlight=False, soft_wrap=True)
        self.steps = steps
        self.last: Event = {}
        """The newest step event."""
        self.valid_loss: float | None = None
        """The newest validation loss."""
        self.starts = 0
        """Starts of the worker group seen: 1 + restarts."""
        self._max_failures = max_failures
        self._shown_at = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal and os.environ.get("TERM") != "dumb":
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
                console=self.console,
                refresh_per_second=8,
            )
            self._task = self._bar.add_task("", total=steps, line="starting the workers ...")

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, text: str, style: str = "") -> None:
        """One line of text above the live line."""
        self.console.print(escape(text), style=style or None)

    def show(self, event: Event) -> None:
        """Show one event of progress.jsonl; unknown kinds are left to the file."""
        kind = event.get("event")
        if kind == "step":
            self._show_step(event)
        elif kind == "start":
            self._show_start(event)
        elif kind == "workers_failed":
            self.note(f"WORKERS FAILED: {event['text']}", style="bold red")
        elif kind == "warning":
            self.note(f"warning: {event['text']}", style="yellow")
        elif kind == "message":
            self.note(str(event["text"]))

    def _show_start(self, event: Event) -> None:
        self.starts += 1
        ranks = f"{event['world_size']} worker{'s' if event['world_size'] > 1 else ''} on {event['device']}"
        where = f"going on after step {event['step']}" if event["step"] else "starting afresh"
        where += f" to step {self.steps}"
        if self.starts == 1:
            self.note(f"{ranks}; {where}")
        else:
            limit = "" if self._max_failures < 0 else f" of {self._max_failures}"
            self.note(f"RESTARTED ({self.starts - 1}{limit}): {ranks}; {where}", style="bold yellow")
        if self._bar:
            self._bar.update(self._task, completed=event["step"], line="")

    def _show_step(self, event: Event) -> None:
        self.last = event
        line = step_line(event)
        if event.get("skipped"):
            self.note(f"step {event['step']} SKIPPED: loss or gradient was not finite", style="bold yellow")
        if event.get("valid_loss") is not None:
            self.valid_loss = event["valid_loss"]
            self.note(f"step {event['step']}: validation loss {self.valid_loss:.4f}", style="bold")
        if self._bar:
            self._bar.update(self._task, completed=event["step"], line=line)
        elif event["step"] >= self.steps or time.monotonic() - self._shown_at >= PLAIN_SECONDS:
            self._shown_at = time.monotonic()
            self.note(f"step {event['step']}/{self.steps}  {line}")
            sys.stdout.flush()


def step_line(event: Event) -> str:
    """The numbers of one step, in the order in which one reads them; unknown ones are left out."""
    parts = [f"loss {event['loss']:.4f}"] if event.get("loss") is not None else []
    if event.get("tokens_per_second") is not None:
        parts.append(f"{event['tokens_per_second']:,.0f} tok/s")
    if event.get("lr") is not None:
        parts.append(f"lr {event['lr']:.2e}")
    if event.get("grad_norm") is not None:
        parts.append(f"grad {event['grad_norm']:.3f}")
    if event.get("memory_bytes") is not None:
        parts.append(f"mem {event['memory_bytes'] / 2**30:.2f} GiB")
    if event.get("mfu") is not None:
        parts.append(f"mfu {event['mfu']:.1%}")
    if event.get("eta_seconds") is not None:
        parts.append(f"eta {duration(event['eta_seconds'])}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """47s, 3m05s, 2h07m, 3d04h."""
    whole = max(0, round(seconds))
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // lower_size:02d}{lower}"
    return f"{whole}s"
