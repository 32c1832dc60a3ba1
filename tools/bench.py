"""Ours beside transformers, in one run: `triptych bench train`.

Two comparisons, fp32 on the CPU: the SSD scan alone, and a whole training step of a small hybrid. Each side
runs in a fresh process (`tools/bench_sides.py`), one after the other, and both leave what they computed in a
file: the numbers are compared before any ratio is reported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from triptych.tools.render import table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

# The largest difference, relative to the largest element, that two fp32 implementations of the same
# mathematics may show: sums of some thousand terms in another order.
AGREEMENT = 2e-3


@dataclass(frozen=True)
class Case:
    """One comparison to make: what runs on both sides, and what is asked of the ratios."""

    name: str
    kind: str
    """"ssd" or "step": which pair of programs in bench_sides."""
    shape: dict[str, Any]
    target_speed: float | None = None
    """Least theirs / ours in time; None: for information."""
    target_memory: float | None = None
    """Largest ours / theirs in peak memory; None: for information."""


@dataclass(frozen=True)
class Side:
    """What one side took: seconds of each repeat, and bytes of the peak above a process without model."""

    seconds: list[float]
    peak_bytes: int

    @property
    def median(self) -> float:
        """Median of the repeats in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Both sides of one case."""

    case: Case
    ours: Side
    theirs: Side
    difference: float
    """Largest relative difference between what the two sides computed."""

    @property
    def speed_ratio(self) -> float:
        """How many times as fast ours is."""
        return self.theirs.median / self.ours.median

    @property
    def memory_ratio(self) -> float:
        """Our peak as a share of theirs."""
        return self.ours.peak_bytes / max(1, self.theirs.peak_bytes)

    @property
    def fast_enough(self) -> bool:
        """True when the target for speed, if there is one, is reached."""
        return self.case.target_speed is None or self.speed_ratio >= self.case.target_speed

    @property
    def small_enough(self) -> bool:
        """True when the target for memory, if there is one, is reached."""
        return self.case.target_memory is None or self.memory_ratio <= self.case.target_memory

    @property
    def ok(self) -> bool:
        """True when each target that the case has is reached."""
        return self.fast_enough and self.small_enough


@dataclass(frozen=True)
class BenchReport:
    """One entry per comparison: times (s), peak memory (bytes), ratios and targets."""

    comparisons: list[Comparison]
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
                f"{1e3 * one.ours.median:.1f}",
                f"{1e3 * one.theirs.median:.1f}",
                f"{one.speed_ratio:.2f}x{verdict(one.case.target_speed, one.fast_enough, '>=')}",
                f"{one.ours.peak_bytes / 2**20:.0f}",
                f"{one.theirs.peak_bytes / 2**20:.0f}",
                f"{one.memory_ratio:.2f}{verdict(one.case.target_memory, one.small_enough, '<=')}",
            ]
            for one in self.comparisons
        ]
        columns = ["case", "ms, ours", "theirs", "speed", "MiB, ours", "theirs", "memory"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        repeats = len(self.comparisons[0].ours.seconds)
        worst = max(one.difference for one in self.comparisons)
        note = Text(
            f"fp32 on the CPU, {self.threads} thread(s), median of {repeats} after warm-up. Memory: peak of "
            f"the resident bytes above the empty process. Results agree within {worst:.0e} of each tensor's "
            f"largest element. {versions}."
        )
        return Group(table_of("bench train: ours against transformers", columns, rows), note)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        comparisons = []
        for one in self.comparisons:
            entry = asdict(one)
            entry["ours"]["median_seconds"] = one.ours.median
            entry["theirs"]["median_seconds"] = one.theirs.median
            comparisons.append(
                entry | {"speed_ratio": one.speed_ratio, "memory_ratio": one.memory_ratio, "ok": one.ok}
            )
        return {"ok": self.ok, "threads": self.threads, "versions": self.versions, "comparisons": comparisons}


TINY: dict[str, dict[str, Any]] = {
    "ssd": {"batch": 1, "length": 96, "heads": 4, "head_dim": 16, "state": 16, "groups": 2, "chunk": 32},
    "step": {
        "batch": 2, "length": 64, "vocab_size": 256, "hidden_size": 64, "layers": 2, "attention_layers": [1],
        "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128,
        "state": 16, "head_dim": 16, "groups": 1, "chunk": 32,
    },
}  # fmt: skip
"""Shapes that take milliseconds."""

SMALL_SCAN = {"batch": 1, "length": 1024, "heads": 8, "head_dim": 64, "state": 64, "groups": 1, "chunk": 256}
DEMO = {
    "batch": 8, "length": 256, "vocab_size": 512, "hidden_size": 128, "layers": 5, "attention_layers": [2],
    "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256,
    "state": 32, "head_dim": 32, "groups": 1, "chunk": 256,
}  # fmt: skip
"""The model and batch of configs/lm/demo.yaml, but with one group: with more, Bamba's gated norm takes its
statistics over all channels, ours over each group's (as mamba-ssm does)."""
SHORT_CHUNKS = {"chunk": 64}
"""Chunks of 256 are what transformers' configurations default to; these are our default. The result is the
same."""


def cases(quick: bool) -> list[Case]:
    """The comparisons of `bench train`; `quick`: the same programs on shapes that take milliseconds."""
    if quick:
        return [
            Case("scan, tiny", "ssd", TINY["ssd"], target_speed=20.0),
            Case("training step, tiny", "step", TINY["step"], target_speed=3.0, target_memory=0.7),
        ]
    scan, step = "scan H8 P64 N64", "training step, demo"
    return [
        Case(scan, "ssd", SMALL_SCAN, target_speed=20.0),
        Case(f"{scan}, their chunk 64", "ssd", SMALL_SCAN | SHORT_CHUNKS),
        Case(step, "step", DEMO, target_speed=3.0, target_memory=0.7),
        Case(f"{step}, their chunk 64", "step", DEMO | SHORT_CHUNKS),
    ]


def bench_train(
    *,
    repeats: int = 5,
    threads: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """The scan's forward+backward and a whole training step, ours against transformers.

    threads: of each process; None takes all cores of this machine.
    quick: tiny shapes, one repeat: shows that it works, says nothing about speed.
    Raises RuntimeError when transformers is not installed (mend: pip install 'triptych[hf]') and when the two
    sides do not compute the same numbers; ValueError for repeats or threads below 1.
    """
    check_options(repeats, threads)
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError(
            "bench train compares with transformers, which is not installed: pip install 'triptych[hf]'"
        )
    threads = threads or os.cpu_count() or 1
    versions: dict[str, str] = {}
    comparisons = []
    for case in cases(quick):
        if progress is not None:
            progress(case.name)
        with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
            times = 1 if quick else repeats
            ours = run_side(case, "ours", repeats=times, threads=threads, folder=folder)
            theirs = run_side(case, "transformers", repeats=times, threads=threads, folder=folder)
            difference = largest_difference(
                Path(folder) / "ours.safetensors", Path(folder) / "transformers.safetensors"
            )
        if not difference <= AGREEMENT:
            raise RuntimeError(
                f"{case.name}: the two sides differ by {difference:.2e} (relative), more than {AGREEMENT:g}, "
                "so their times cannot be compared; this is a defect of ours or a change in transformers "
                f"{theirs['versions'].get('transformers')}"
            )
        versions |= ours["versions"] | theirs["versions"]
        sides = [Side(side["seconds"], side["peak_bytes"]) for side in (ours, theirs)]
        comparisons.append(Comparison(case, sides[0], sides[1], difference))
    return BenchReport(comparisons, versions, threads)


def check_options(repeats: int, threads: int | None) -> None:
    """Raises ValueError for repeats or threads below 1."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats} measures nothing; give 1 or more")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} cannot compute; give 1 or more")


def verdict(target: float | None, reached: bool, sign: str) -> str:
    """A target and whether it was reached, to stand behind a number; empty where there is none."""
    return "" if target is None else f" ({sign} {target:g}: {'reached' if reached else 'MISSED'})"


def run_side(case: Case, side: str, *, repeats: int, threads: int, folder: str) -> dict[str, Any]:
    """Run one side in a fresh process; returns {"seconds", "peak_bytes", "versions"}.

    Raises RuntimeError with the end of the process's error output when it fails.
    """
    request = {
        "kind": case.kind, "side": side, "shape": case.shape, "warm_up_shape": TINY[case.kind],
        "repeats": repeats, "threads": threads, "result": str(Path(folder) / f"{side}.safetensors"),
    }  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    # Not in the caller's directory: in a checkout of ours, transformers would take our folder `kernels` for
    # the package of that name.
    done = subprocess.run(
        [sys.executable, "-m", "triptych.tools.bench_sides", json.dumps(request)],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{case.name}, side {side}: failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def largest_difference(ours: Path, theirs: Path) -> float:
    """Largest |ours - theirs| over tensors of the two files, each relative to its largest element.

    Raises RuntimeError when the files do not hold the same tensors.
    """
    from safetensors.torch import load_file

    mine, other = load_file(ours), load_file(theirs)
    if mine.keys() != other.keys():
        raise RuntimeError(f"the two sides computed different things: {sorted(mine.keys() ^ other.keys())}")
    worst = 0.0
    for name, expected in other.items():
        if mine[name].shape != expected.shape:
            raise RuntimeError(f"{name} is {tuple(mine[name].shape)} here and {tuple(expected.shape)} there")
        scale = float(expected.double().abs().max())
        worst = max(worst, float((mine[name].double() - expected.double()).abs().max()) / max(scale, 1e-30))
    return worst
