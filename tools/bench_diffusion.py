"""A denoiser's training step in one run: `triptych bench diffusion`.

Ours beside the published formulation in plain PyTorch (`bench_dit.py`), and ours with TREAD beside ours
without, fp32 on the CPU. What is compared runs in processes of its own (`bench_diffusion_sides.py`), which
take turns step by step, so that whatever else the machine does falls on all of them alike. Prediction and
gradients are held against the published formulation before any ratio is reported.
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

from triptych.tools.bench import AGREEMENT, Case, Comparison, Side, check_options, verdict
from triptych.tools.render import table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

DIT_S: dict[str, Any] = {"num_layers": 12, "hidden_size": 384, "num_heads": 6, "recompute": "none"}
STEP = DIT_S | {"input_size": 32, "batch": 8}
"""256 tokens of DiT-S/2."""
LONG = DIT_S | {"input_size": 64, "batch": 2}
"""1,024 tokens."""
TINY: dict[str, Any] = {
    "num_layers": 7, "hidden_size": 32, "num_heads": 2, "recompute": "none", "input_size": 8, "batch": 2,
}  # fmt: skip
"""Takes milliseconds."""
TREAD_RATE = 0.5
TREAD_START, TREAD_BEFORE_END = 2, 4
"""Tokens go around the blocks [2, num_layers - 4)."""
FALLS_BY_A_QUARTER = 1 / 0.75


@dataclass(frozen=True)
class Runner:
    """A process to start: which side of bench_diffusion_sides, on what shape."""

    name: str
    side: str
    shape: dict[str, Any]


@dataclass(frozen=True)
class Round:
    """Runners that take turns, and the comparisons to draw from them: case, ours, what stands beside."""

    runners: list[Runner]
    cases: list[tuple[Case, str, str]]


@dataclass(frozen=True)
class DiffusionBenchReport:
    """One entry per comparison: times (s), peak memory (bytes), ratios and targets."""

    comparisons: list[Comparison]
    beside: list[str]
    """What each is compared with."""
    versions: dict[str, str]
    threads: int

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
        worst = max(one.difference for one in self.comparisons)
        note = Text(
            f"Forward, backward and AdamW (ours on all sides) in fp32 on the CPU, {self.threads} thread(s), "
            f"median of {repeats} in turn after warm-up. Memory: peak of the resident bytes above the empty "
            f"process. Prediction and gradients agree with the published formulation within {worst:.0e} of "
            f"each tensor's largest element. {versions}."
        )
        return Group(table_of("bench diffusion: a training step of a denoiser", columns, rows), note)

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


def rounds(quick: bool) -> list[Round]:
    """What `bench diffusion` measures; `quick`: the same programs on shapes that take milliseconds."""
    step, long = (TINY, TINY) if quick else (STEP, LONG)
    name = "tiny DiT" if quick else "DiT-S/2"
    published, none, selective = "published", f"{name}, recompute none", f"{name}, recompute selective"
    whole, tread = "without", f"{name}, {_tokens(long)} tokens, TREAD {TREAD_RATE:.0%}"
    routed = {"rate": TREAD_RATE, "routed": [TREAD_START, long["num_layers"] - TREAD_BEFORE_END]}
    return [
        Round(
            [
                Runner(none, "ours", step),
                Runner(selective, "ours", step | {"recompute": "selective"}),
                Runner(published, "published", step),
            ],
            [
                (Case(none, "step", step, target_speed=1.0), none, published),
                (Case(selective, "step", step, target_memory=1.0), selective, published),
            ],
        ),
        Round(
            [Runner(tread, "ours", long | routed), Runner(whole, "ours", long)],
            [(Case(tread, "tread", long | routed, target_speed=FALLS_BY_A_QUARTER), tread, whole)],
        ),
    ]


def bench_diffusion(
    *,
    repeats: int = 7,
    threads: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> DiffusionBenchReport:
    """A training step of DiT-S/2, ours against the published formulation, and with TREAD against without.

    threads: of each process; None takes all cores of this machine.
    quick: tiny shapes, one repeat: shows that it works, says nothing about speed.
    Raises RuntimeError when ours and the published formulation do not compute the same numbers; ValueError
    for repeats or threads below 1.
    """
    check_options(repeats, threads)
    threads = threads or os.cpu_count() or 1
    versions: dict[str, str] = {}
    comparisons, besides = [], []
    for one in rounds(quick):
        results = run_round(one.runners, repeats=1 if quick else repeats, threads=threads, progress=progress)
        for name, (_, found) in results.items():
            if not found["difference"] <= AGREEMENT:
                raise RuntimeError(
                    f"{name} differs by {found['difference']:.2e} (relative) from the published formulation, "
                    f"more than {AGREEMENT:g}, so their times cannot be compared; this is a defect of ours"
                )
            versions |= found["versions"]
        for case, ours, beside in one.cases:
            difference = results[ours][1]["difference"]
            comparisons.append(Comparison(case, results[ours][0], results[beside][0], difference))
            besides.append(beside)
    return DiffusionBenchReport(comparisons, besides, versions, threads)


def run_round(
    runners: list[Runner],
    *,
    repeats: int,
    threads: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, tuple[Side, dict[str, Any]]]:
    """Let the runners take `repeats` turns each; what each took, and the last line it printed.

    Raises RuntimeError with the end of a process's error output when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder, contextlib.ExitStack() as stack:
        started = {}
        for runner in runners:
            if progress is not None:
                progress(runner.name)
            started[runner.name] = stack.enter_context(_started(runner, threads, folder))
            started[runner.name].hear()
        seconds: dict[str, list[float]] = {name: [] for name in started}
        for turn in range(repeats):
            # Who comes after whom shall not matter either.
            for name, process in reversed(started.items()) if turn % 2 else started.items():
                process.turn()
                seconds[name].append(process.hear())
        results = {}
        for name, process in started.items():
            found = process.end()
            results[name] = Side(seconds[name], found["peak_bytes"]), found
        return results


class _Process:
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
def _started(runner: Runner, threads: int, folder: str) -> Iterator[_Process]:
    request = {"side": runner.side, "shape": runner.shape, "warm_up_shape": TINY, "threads": threads}
    # Not in the caller's directory: in a checkout of ours, other packages would take our folders for theirs.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "triptych.tools.bench_diffusion_sides", json.dumps(request)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)}, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        ) as process,
    ):  # fmt: skip
        try:
            yield _Process(runner, process, errors)
        finally:
            process.kill()


def _tokens(shape: dict[str, Any]) -> int:
    return (shape["input_size"] // 2) ** 2
