"""A denoiser's training step in one run: `triptych bench diffusion`.

Ours beside the published formulation in plain PyTorch (`bench_dit.py`), and ours with TREAD beside ours
without, fp32 on the CPU, in processes that take turns (`bench_rounds.py`, `bench_diffusion_sides.py`).
Prediction and gradients are held against the published formulation before any ratio is reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from triptych.tools.bench import Case, check_options
from triptych.tools.bench_rounds import Round, RoundReport, Runner, compare

SIDES = "triptych.tools.bench_diffusion_sides"
ORACLE = "the published formulation"
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
                Runner(none, SIDES, "ours", step, TINY),
                Runner(selective, SIDES, "ours", step | {"recompute": "selective"}, TINY),
                Runner(published, SIDES, "published", step, TINY),
            ],
            [
                (Case(none, "step", step, target_speed=1.0), none, published),
                (Case(selective, "step", step, target_memory=1.0), selective, published),
            ],
        ),
        Round(
            [Runner(tread, SIDES, "ours", long | routed, TINY), Runner(whole, SIDES, "ours", long, TINY)],
            [(Case(tread, "tread", long | routed, target_speed=FALLS_BY_A_QUARTER), tread, whole)],
        ),
    ]


def bench_diffusion(
    *,
    repeats: int = 7,
    threads: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> RoundReport:
    """A training step of DiT-S/2, ours against the published formulation, and with TREAD against without.

    threads: of each process; None takes all cores of this machine.
    quick: tiny shapes, one repeat: shows that it works, says nothing about speed.
    Raises RuntimeError when ours and the published formulation do not compute the same numbers; ValueError
    for repeats or threads below 1.
    """
    check_options(repeats, threads)
    threads = threads or os.cpu_count() or 1
    comparisons, besides, versions = compare(
        rounds(quick), repeats=1 if quick else repeats, threads=threads, oracle=ORACLE, progress=progress
    )
    title = "bench diffusion: a training step of a denoiser"
    what = "Forward, backward and AdamW (ours on all sides)"
    return RoundReport(comparisons, besides, versions, threads, title, what, ORACLE)


def _tokens(shape: dict[str, Any]) -> int:
    return (shape["input_size"] // 2) ** 2
