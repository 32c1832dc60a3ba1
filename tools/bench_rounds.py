"""Processes that take turns, and the comparisons drawn from them.

What is compared runs in processes of its own (`bench_sides.serve`), which take turns step by step, so that
whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from triptych.tools.bench import AGREEMENT, Case, Comparison, Side, verdict
from triptych.tools.render import table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
"""What glibc is told in the processes that measure memory of `Round.exact_memory`."""


@dataclass(frozen=True)
class Runner:
    """A process to start.

    module: what it runs, a module that ends in `bench_sides.serve`. side, shape: what it is told.
    warm_up_shape: one that takes milliseconds.
    """

    name: str
    module: str
    side: str
    shape: dict[str, Any]
    warm_up_shape: dict[str, Any]


@dataclass(frozen=True)
class Round:
    """Runners that take turns, and the comparisons to draw from them: case, ours, what stands beside."""

    runners: list[Runner]
    cases: list[tuple[Case, str, str]]
    exact_memory: bool = False
    """Measure memory in processes of its own, in which the C library (glibc) gives back at once what is
    freed, so that holes between its blocks do not count. Time is measured as the library comes."""


@dataclass(frozen=True)
class RoundReport:
    """One entry per comparison: times (s), peak memory (bytes), ratios and targets."""

    comparisons: list[Comparison]
    beside: list[str]
    """What each is compared with."""
    versions: dict[str, str]
    threads: int
    title: str
    what: str
    """What is timed, to begin a sentence with."""
    oracle: str
    """What the results were held against."""
    exact_memory: bool = False
    """As in `Round`, of all rounds."""

    @property
    def ok(self) -> bool:
        """True when every comparison reaches its targets."""
        return all(comparison.ok for comparison in self.comparisons)

    def table(self) -> RenderableType:
        """The comparisons as a rich renderable."""
        rows = [
            [
                one.case.name,
                beside,
                f"{1e3 * one.ours.median:.0f}",
                f"{1e3 * one.theirs.median:.0f}",
                f"{one.speed_ratio:.2f}x{verdict(one.case.target_speed, one.fast_enough, '>=')}",
                f"{one.ours.peak_bytes / 2**20:.0f}",
                f"{one.theirs.peak_bytes / 2**20:.0f}",
                f"{one.memory_ratio:.2f}{verdict(one.case.target_memory, one.small_enough, '<=')}",
            ]
            for one, beside in zip(self.comparisons, self.beside, strict=True)
        ]
        columns = ["case", "beside", "ms", "beside", "speed", "MiB", "beside", "memory"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        repeats = len(self.comparisons[0].ours.seconds)
        memory = ", in processes that give freed memory back at once" if self.exact_memory else ""
        worst = max(one.difference for one in self.comparisons)
        note = Text(
            f"{self.what} in fp32 on the CPU, {self.threads} thread(s), median of {repeats} in turn after "
            f"warm-up. Memory: peak of the resident bytes above the empty process{memory}. Results and "
            f"gradients agree with {self.oracle} within {worst:.0e} of each tensor's largest element. "
            f"{versions}."
        )
        return Group(table_of(self.title, columns, rows), note)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        comparisons = []
        for one, beside in zip(self.comparisons, self.beside, strict=True):
            entry = asdict(one)
            entry["ours"]["median_seconds"] = one.ours.median
            entry["theirs"]["median_seconds"] = one.theirs.median
            comparisons.append(
                entry
                | {"beside": beside, "speed_ratio": one.speed_ratio, "memory_ratio": one.memory_ratio}
                | {"ok": one.ok}
            )
        return {"ok": self.ok, "threads": self.threads, "versions": self.versions, "comparisons": comparisons}


def compare(
    rounds: list[Round],
    *,
    repeats: int,
    threads: int,
    oracle: str,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Comparison], list[str], dict[str, str]]:
    """Run all rounds; the comparisons, what each is beside, and the versions of what was run.

    Raises RuntimeError when a side does not compute what the oracle does.
    """
    versions: dict[str, str] = {}
    comparisons, besides = [], []
    for one in rounds:
        results = run_round(
            one.runners, repeats=repeats, threads=threads, exact_memory=one.exact_memory, progress=progress
        )
        for name, (_, found) in results.items():
            if not found["difference"] <= AGREEMENT:
                raise RuntimeError(
                    f"{name} differs by {found['difference']:.2e} (relative) from {oracle}, more than "
                    f"{AGREEMENT:g}, so their times cannot be compared; this is a defect of ours"
                )
            versions |= found["versions"]
        for case, ours, beside in one.cases:
            difference = max(results[side][1]["difference"] for side in (ours, beside))
            comparisons.append(Comparison(case, results[ours][0], results[beside][0], difference))
            besides.append(beside)
    return comparisons, besides, versions


def run_round(
    runners: list[Runner],
    *,
    repeats: int,
    threads: int,
    exact_memory: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, tuple[Side, dict[str, Any]]]:
    """Let the runners take `repeats` turns each; what each took, and the last line it printed.

    Raises RuntimeError with the end of a process's error output when it fails.
    """
    results = {
        name: (Side(seconds, found["peak_bytes"]), found)
        for name, (seconds, found) in take_turns(
            runners, repeats=repeats, threads=threads, progress=progress
        ).items()
    }
    if exact_memory:
        for runner in runners:
            side, found = results[runner.name]
            results[runner.name] = Side(side.seconds, _exact_peak_bytes(runner, threads)), found
    return results


def take_turns(
    runners: list[Runner], *, repeats: int, threads: int, progress: Callable[[str], None] | None = None
) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """By runner: what its process answered in each turn, and at its end. Raises as run_round."""
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder, contextlib.ExitStack() as stack:
        processes: dict[str, Process] = {}
        for runner in runners:
            if progress is not None:
                progress(runner.name)
            processes[runner.name] = stack.enter_context(started(runner, threads, folder))
            processes[runner.name].hear()
        answers: dict[str, list[Any]] = {name: [] for name in processes}
        for turn in range(repeats):
            # Who comes after whom shall not matter either.
            for name, process in reversed(processes.items()) if turn % 2 else processes.items():
                process.turn()
                answers[name].append(process.hear())
        return {name: (answers[name], process.end()) for name, process in processes.items()}


def _exact_peak_bytes(runner: Runner, threads: int) -> int:
    with (
        tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder,
        started(runner, threads, folder, GIVING_BACK) as process,
    ):
        process.hear()
        return process.end()["peak_bytes"]


class Process:
    """A running side, with which one speaks in lines."""

    def __init__(self, runner: Runner, process: subprocess.Popen[str], errors: Any) -> None:
        self.runner, self.process, self.errors = runner, process, errors

    def turn(self) -> None:
        """Let it make a step."""
        assert self.process.stdin is not None, "it was opened as a pipe"
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """Its next answer."""
        assert self.process.stdout is not None, "it was opened as a pipe"
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"{self.runner.name}: failed\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def end(self) -> dict[str, Any]:
        """Its last answer."""
        assert self.process.stdin is not None, "it was opened as a pipe"
        self.process.stdin.close()
        return self.hear()


@contextlib.contextmanager
def started(
    runner: Runner, threads: int, folder: str, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    """The runner's process, in `folder`, as long as the block lasts."""
    request = {
        "side": runner.side, "shape": runner.shape, "warm_up_shape": runner.warm_up_shape, "threads": threads,
    }  # fmt: skip
    # Not in the caller's directory: in a checkout of ours, other packages would take our folders for theirs.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", runner.module, json.dumps(request)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | (environment or {}), cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip
        try:
            yield Process(runner, process, errors)
        finally:
            process.kill()
