"""Every operator beside its peers, in one run: `triptych bench kernels`.

Each side runs in a process of its own; the processes of a problem take turns, so that whatever else the
machine does falls on all alike. Outputs and gradients of every side are held against the reference in float64
before a ratio is reported. Ceilings of the device (a copy, a matrix product) are measured in the same run.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.text import Text

from triptych import kernels
from triptych.tools.bench import check_options, verdict
from triptych.tools.bench_rounds import Runner, started, take_turns
from triptych.tools.kernel_bench.picture import ratio_picture
from triptych.tools.kernel_bench.problem import Problem, Shape, Target, make_importable
from triptych.tools.kernel_bench.problems import chosen
from triptych.tools.render import bytes_text, table_of
from triptych.training.pictures import write_png

if TYPE_CHECKING:
    from rich.console import RenderableType

SIDE = "triptych.tools.kernel_bench.side"
AGREEMENT = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Largest relative difference to the reference that a side may show and still be compared."""


@dataclass(frozen=True)
class SideResult:
    """One side of a problem. Seconds are medians of a step; difference is to the reference in float64."""

    side: str
    form: str
    """Of ours: what the dispatcher took; of others their name."""
    forward: float
    both: float
    """Forward and backward."""
    peak_bytes: int
    difference: float


@dataclass(frozen=True)
class ProblemResult:
    """A problem at one shape: ours first, then what stands beside."""

    problem: str
    shape: Shape
    sides: list[SideResult]
    moved_bytes: int
    """Least traffic of forward and backward: arguments, results and gradients, each once per pass."""
    flops: int
    """Of forward and backward by the operators' formulas; 0 where only element-wise work is done."""
    saved_bytes: int | None
    """Kept for backward beyond the arguments; None where it depends on the documents."""
    verdicts: list[tuple[str, bool]]
    """Targets in words, and whether each was reached."""

    @property
    def ours(self) -> SideResult:
        """Ours."""
        return self.sides[0]

    @property
    def ok(self) -> bool:
        """True when every target is reached."""
        return all(reached for _, reached in self.verdicts)

    def ratio(self, side: SideResult) -> float:
        """How many times as fast ours is, forward and backward."""
        return side.both / self.ours.both


@dataclass(frozen=True)
class KernelReport:
    """All problems, and what they were measured on."""

    results: list[ProblemResult]
    ceilings: dict[str, float]
    versions: dict[str, str]
    device: str
    dtype: str
    threads: int
    repeats: int
    left_out: list[str]
    """Peers that are not installed."""

    @property
    def ok(self) -> bool:
        """True when every target is reached."""
        return all(result.ok for result in self.results)

    def table(self) -> RenderableType:
        """A line per side, below the problem's name."""
        rows = []
        for result in self.results:
            rows.append([f"[bold]{result.problem}[/] {_words(result.shape)}"])
            rows += [self._row(result, side) for side in result.sides]
        columns = [
            "",
            "fwd ms",
            "fwd+bwd",
            "speed",
            "MiB",
            "mem.",
            "GB/s",
            "copy",
            "GFLOP/s",
            "saved",
            "error",
        ]
        bandwidth, peak = self.ceilings["bytes_per_second"], self.ceilings["flops_per_second"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        threads = f", {self.threads} thread(s)" if self.device == "cpu" else ""
        left_out = f" Not installed: {', '.join(self.left_out)}." if self.left_out else ""
        note = Text(
            f"{self.device}{threads}, {self.dtype}, median of {self.repeats} in turn after warm-up (fewer of "
            "what takes seconds). speed, mem.: peer / ours, forward and backward. GB/s: arguments, results "
            f"and gradients once per pass; copy: their share of the {bandwidth / 1e9:.1f} that a copy makes. "
            f"A matrix product makes {peak / 1e9:.0f} GFLOP/s. saved: kept for backward beyond arguments. "
            f"error: outputs and gradients against the reference in float64. {versions}.{left_out}"
        )
        missed = [f"MISSED: {words}" for result in self.results for words, ok in result.verdicts if not ok]
        reached = [f"reached: {words}" for result in self.results for words, ok in result.verdicts if ok]
        return Group(table_of("bench kernels", columns, rows), note, Text("\n".join([*reached, *missed])))

    def _row(self, result: ProblemResult, side: SideResult) -> list[str]:
        ours = side is result.ours
        rate = result.moved_bytes / side.both
        return [
            f"ours ({side.form})" if ours else side.side,
            f"{1e3 * side.forward:.2f}",
            f"{1e3 * side.both:.2f}",
            "" if ours else f"{result.ratio(side):.2f}x",
            f"{side.peak_bytes / 2**20:.0f}",
            "" if ours else f"{side.peak_bytes / max(1, result.ours.peak_bytes):.2f}x",
            f"{rate / 1e9:.1f}",
            f"{100 * rate / self.ceilings['bytes_per_second']:.0f} %",
            f"{result.flops / side.both / 1e9:.0f}" if result.flops else "",
            bytes_text(result.saved_bytes) if ours and result.saved_bytes is not None else "",
            f"{side.difference:.0e}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"ok": self.ok}


def bench_kernels(
    *,
    ops: Sequence[str] = (),
    against: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    repeats: int = 7,
    threads: int | None = None,
    quick: bool = False,
    plot: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> KernelReport:
    """Time operators beside their peers.

    ops: names of operators (all of whose problems run); empty: all. against: peers, by the first letters of
    their names, or forms of ours; empty: every peer that is installed. device: "cpu" or "cuda"; None: the GPU
    if there is one.
    dtype: of inputs; None: float32 on the CPU, bfloat16 on a GPU. threads: of each process on a CPU; None:
    all cores. quick: tiny shapes, one turn: shows that it works, not how fast. plot: a PNG to draw.
    Raises ValueError for what is not known, RuntimeError when a side computes something else.
    """
    check_options(repeats, threads)
    make_importable()
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device not in (None, *there):
        raise ValueError(f"device={device!r} is not here; use one of {there}")
    place = torch.device(device or there[-1])
    kind = _dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    wanted = chosen(ops)
    _check_names(against, wanted)
    settings = Settings(place, kind, 1 if quick else repeats, threads or os.cpu_count() or 1, quick)
    ceilings = settings.ceilings()
    results: list[ProblemResult] = []
    versions: dict[str, str] = {}
    left_out: set[str] = set()
    for problem in wanted:
        sides, missing = _sides(problem, place, against)
        left_out |= missing
        for shape in problem.shapes["tiny" if quick else place.type]:
            result, found = settings.measure(problem, shape, sides, progress)
            results.append(result)
            versions |= found
    report = KernelReport(
        results, ceilings, versions, _device_name(place), str(kind).removeprefix("torch."), settings.threads,
        settings.repeats, sorted(left_out),
    )  # fmt: skip
    if plot is not None:
        bars = {
            f"{result.problem} {_words(result.shape)}": {
                side.side: result.ratio(side) for side in result.sides[1:]
            }
            for result in results
        }
        write_png(Path(plot).expanduser(), ratio_picture(bars))
    return report


@dataclass(frozen=True)
class Settings:
    """How a run measures."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    threads: int
    quick: bool

    def runner(self, name: str, side: str, request: dict[str, Any]) -> Runner:
        """A process of one side."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Runner(name, SIDE, side, {"device": str(self.device), "dtype": dtype, **request}, {})

    def ceilings(self) -> dict[str, float]:
        """What the device can: bytes/s of a copy, FLOP/s of a matrix product."""
        with (
            tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder,
            started(self.runner("ceilings", "ceilings", {}), self.threads, folder) as process,
        ):
            return process.hear()

    def measure(
        self, problem: Problem, shape: Shape, sides: list[str], progress: Callable[[str], None] | None
    ) -> tuple[ProblemResult, dict[str, str]]:
        """Let the sides take turns."""
        runners = {side: f"{problem.name} {_words(shape)}: {side}" for side in sides}
        taken = take_turns(
            [
                self.runner(name, side, {"problem": problem.name, "sizes": shape})
                for side, name in runners.items()
            ],
            repeats=min(self.repeats, problem.repeats),
            threads=self.threads,
            progress=progress,
        )
        turns = {side: taken[name][0] for side, name in runners.items()}
        ends = {side: taken[name][1] for side, name in runners.items()}
        for side, end in ends.items():
            if not end["difference"] <= AGREEMENT[self.dtype]:
                raise RuntimeError(
                    f"{problem.name}: {side} differs by {end['difference']:.1e} (relative) from the "
                    "reference in float64, so its time cannot be compared"
                    + ("; this is a defect of ours" if side == "ours" else "")
                )
        found = [
            SideResult(
                side, self._default(problem) if side == "ours" else side,
                statistics.median(turn["forward"] for turn in turns[side]),
                statistics.median(turn["both"] for turn in turns[side]),
                ends[side]["peak_bytes"], ends[side]["difference"],
            )
            for side in sides
        ]  # fmt: skip
        versions: dict[str, str] = {}
        for end in ends.values():
            versions |= end["versions"]
        targets = (
            []
            if self.quick
            else [t for t in problem.targets if (t.device, t.dtype) == (self.device.type, self.dtype)]
        )
        verdicts = [_judge(problem, target, found) for target in targets if target.peer in sides]
        return ProblemResult(
            problem.name, shape, found, **ends["ours"]["counts"], verdicts=verdicts
        ), versions

    def _default(self, problem: Problem) -> str:
        rows = kernels.table(self.device)
        return next(row.form for row in rows if row.op == problem.op and row.default)


def _judge(problem: Problem, target: Target, sides: list[SideResult]) -> tuple[str, bool]:
    ours, theirs = sides[0], next(side for side in sides if side.side == target.peer)
    speed, memory = theirs.both / ours.both, ours.peak_bytes / max(1, theirs.peak_bytes)
    fast = target.speed is None or speed >= target.speed
    small = target.memory is None or memory <= target.memory
    words = f"{problem.name} beside {target.peer}: speed {speed:.2f}x{verdict(target.speed, fast, '>=')}"
    if target.memory is not None:
        words += f", memory {memory:.2f}{verdict(target.memory, small, '<=')}"
    return words, fast and small


def _sides(problem: Problem, device: torch.device, against: Sequence[str]) -> tuple[list[str], set[str]]:
    """Ours and what stands beside it, and which peers are not installed."""
    here = [peer for peer in problem.peers if device.type in peer.devices]
    missing = {peer.name for peer in here if peer.missing()}
    rows = [row for row in kernels.table(device) if row.op == problem.op and row.installed]
    forms = [row.form for row in rows if not row.default and row.form != "reference"]
    names = [peer.name for peer in here if peer.name not in missing]
    # On a CPU the default is the only form that is meant to be fast.
    names += [form for form in forms if device.type == "cuda" or form in against]
    if against:
        names = [name for name in names if any(name.startswith(wanted) for wanted in against)]
    return ["ours", *names], missing


def _check_names(against: Sequence[str], wanted: list[Problem]) -> None:
    names = {peer.name for problem in wanted for peer in problem.peers}
    names |= {form for problem in wanted for form in kernels.forms(problem.op)}
    for start in against:
        if not any(name.startswith(start) for name in names):
            raise ValueError(f"against={start!r} is no peer of these operators; use some of {sorted(names)}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if found not in AGREEMENT:
        known = [str(dtype).removeprefix("torch.") for dtype in AGREEMENT]
        raise ValueError(f"dtype={name!r} is not one to measure; use one of {known}")
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _words(shape: Shape) -> str:
    return " ".join(f"{name}{value}" for name, value in shape.items())
