"""Mixture of experts in one run: `triptych bench moe`.

Our layer beside a loop over experts and beside every expert on every token, and retrieval by product keys
beside scoring all experts, fp32 on the CPU, in processes that take turns (`bench_rounds.py`,
`bench_moe_sides.py`). Results and gradients are held against plain formulas in fp64 before any ratio is
reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from triptych.tools.bench import Case, check_options
from triptych.tools.bench_rounds import Round, RoundReport, Runner, compare

SIDES = "triptych.tools.bench_moe_sides"
ORACLE = "the formulas in fp64"

LAYER: dict[str, Any] = {
    "kind": "layer", "tokens": 4096, "hidden_size": 256, "intermediate_size": 1024, "experts": 16, "top_k": 2,
}  # fmt: skip
TINY_LAYER: dict[str, Any] = {
    "kind": "layer", "tokens": 96, "hidden_size": 32, "intermediate_size": 48, "experts": 4, "top_k": 2,
}  # fmt: skip
RETRIEVAL: dict[str, Any] = {
    "kind": "retrieval", "tokens": 4096, "experts": 4096, "heads": 4, "key_size": 128, "top_k": 8,
}  # fmt: skip
"""Queries, keys and experts of a query as `model.product_keys` has them by default."""
TINY_RETRIEVAL: dict[str, Any] = {
    "kind": "retrieval", "tokens": 64, "experts": 49, "heads": 2, "key_size": 8, "top_k": 4,
}  # fmt: skip
"""Take milliseconds."""


def rounds(quick: bool) -> list[Round]:
    """What `bench moe` measures; `quick`: the same programs on shapes that take milliseconds."""
    layer, retrieval = (TINY_LAYER, TINY_RETRIEVAL) if quick else (LAYER, RETRIEVAL)
    moe = f"{layer['experts']} experts, top {layer['top_k']}"
    loop, dense = "loop over experts", "every expert, every token"
    keys = f"product keys, {retrieval['experts']} experts"
    scores, sums = "scores of all", "sums of all pairs"
    return [
        Round(
            [Runner(name, SIDES, side, layer, TINY_LAYER) for name, side in
             ((moe, "ours"), (loop, "loop"), (dense, "dense"))],
            [
                (Case(moe, "layer", layer, target_speed=1.0, target_memory=1.0), moe, loop),
                (Case(moe, "layer", layer, target_speed=4.0), moe, dense),
            ],
            exact_memory=True,
        ),
        Round(
            [Runner(name, SIDES, side, retrieval, TINY_RETRIEVAL) for name, side in
             ((keys, "ours"), (scores, "scores"), (sums, "sums"))],
            [
                (Case(keys, "retrieval", retrieval, target_speed=5.0), keys, scores),
                (Case(keys, "retrieval", retrieval), keys, sums),
            ],
            exact_memory=True,
        ),
    ]  # fmt: skip


def bench_moe(
    *,
    repeats: int = 7,
    threads: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> RoundReport:
    """A layer of experts and retrieval by product keys, forward and backward, beside other ways to the same.

    threads: of each process; None takes all cores of this machine.
    quick: tiny shapes, one repeat: shows that it works, says nothing about speed.
    Raises RuntimeError when a side does not compute what it should; ValueError for repeats or threads below
    1.
    """
    check_options(repeats, threads)
    threads = threads or os.cpu_count() or 1
    comparisons, besides, versions = compare(
        rounds(quick), repeats=1 if quick else repeats, threads=threads, oracle=ORACLE, progress=progress
    )
    title = "bench moe: mixture of experts"
    what = "Forward and backward"
    return RoundReport(comparisons, besides, versions, threads, title, what, ORACLE, exact_memory=True)
