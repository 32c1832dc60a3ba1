"""Does every layout give the same training? `triptych verify`.

A run is a function of its configuration and its data, never of its layout. This tool shows it for a user's
own configuration: in float64, on the CPU, with real gloo processes, each layout trains some steps on the same
batches as one process does, and the losses, every parameter's gradient, the gradient norm and the parameters
after the steps are held against that process's.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from triptych.models.count import build_on_meta
from triptych.parallel.config import ParallelConfig
from triptych.parallel.expert import has_experts
from triptych.parallel.layout import Layout, one_pass
from triptych.parallel.local import run_local
from triptych.tools.layouts import LayoutName, default_layouts, parse_layout
from triptych.tools.render import table_of
from triptych.tools.verify_rank import Job, RankResult, Worst, run_rank
from triptych.tools.verify_samples import corpus_samples, synthetic_samples
from triptych.training.check import check_layout
from triptych.training.objectives import build_objective
from triptych.training.sections import tokens_per_sample

if TYPE_CHECKING:
    from rich.console import RenderableType

    from triptych.training.sections import RunSections


@dataclass(frozen=True)
class LayoutResult:
    """How far one layout is from one process: relative differences, and where the largest is."""

    layout: str
    world_size: int
    seconds: float
    ok: bool
    loss: float
    """Largest over the steps."""
    grad_norm: float
    """Largest over the steps, before clipping."""
    gradient: Worst
    """Largest over the parameters, in the first step."""
    parameter: Worst
    """Largest over the parameters, after the last step."""


@dataclass(frozen=True)
class VerifyReport:
    """One result per layout that ran, and the reason for each that did not."""

    results: list[LayoutResult]
    skipped: dict[str, str]
    """Layout of the default list -> why this configuration cannot have it."""
    failed: dict[str, str]
    """Layout -> the error that ended it."""
    steps: int
    tolerance: float
    losses: list[float]
    """Of the single process, per step."""

    @property
    def ok(self) -> bool:
        """True when at least one layout ran, none failed, and each stayed within the tolerance."""
        return bool(self.results) and not self.failed and all(result.ok for result in self.results)

    def table(self) -> RenderableType:
        """Largest differences per layout as a rich renderable."""
        rows = [
            [
                result.layout,
                result.world_size,
                f"{result.loss:.1e}",
                f"{result.gradient.relative:.1e}\n{result.gradient.name}",
                f"{result.grad_norm:.1e}",
                f"{result.parameter.relative:.1e}",
                "yes" if result.ok else "NO",
            ]
            for result in self.results
        ]
        columns = ["layout", "ranks", "loss", "gradient, and whose", "gradient norm", "parameters", "same"]
        title = (
            f"Largest relative difference from one process, float64, {self.steps} steps, "
            f"tolerance {self.tolerance:g}"
        )
        parts: list[RenderableType] = [table_of(title, columns, rows)]
        parts += [Text(f"not run: {layout}: {reason}", "yellow") for layout, reason in self.skipped.items()]
        parts += [Text(f"FAILED: {layout}: {error}", "red") for layout, error in self.failed.items()]
        parts += [Text(line, "red") for line in map(self._complaint, self.results) if line]
        return Group(*parts)

    def _complaint(self, result: LayoutResult) -> str:
        if result.ok:
            return ""
        return (
            f"{result.layout} differs: worst gradient {result.gradient.name} (relative "
            f"{result.gradient.relative:.2e}, absolute {result.gradient.absolute:.2e}), worst parameter "
            f"{result.parameter.name} (relative {result.parameter.relative:.2e}), loss {result.loss:.2e}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"ok": self.ok}


def verify(
    run: RunSections,
    layouts: Sequence[str] | None = None,
    *,
    steps: int = 3,
    tolerance: float = 1e-9,
    synthetic: bool = False,
    timeout: float = 600.0,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare each layout of `run` with one process, in float64, over local gloo processes on the CPU.

    layouts: such as "tp2", "tp2.pp2" or "tp2,pp2", "dp_shard2.dp_replicate2+selective"; None or empty takes
    those of `layouts.default_layouts` and drops, with its reason, each that this configuration makes illegal.
    Nothing of the configuration is scaled down: override model.num_layers and the like to make it quicker.
    Only the micro-batch is made smaller where a layout has more data ranks or stages than it leaves samples
    for.
    steps: optimizer steps, with the run's own optimizer, schedule and clipping.
    synthetic: random tokens or images instead of those of `data.sources` (for when there are none).
    timeout: seconds for one layout.
    progress: called with one line of text per layout begun and ended.

    Raises ValueError for a layout that cannot be read, for a named layout that is illegal here, and for a
    corpus that is missing (mend: --synthetic).
    """
    if steps < 1:
        raise ValueError(f"steps={steps} trains nothing; give 1 or more")
    chosen, skipped = _choose(run, layouts)
    make = synthetic_samples if synthetic else corpus_samples
    samples = make(run, steps)
    say = progress or (lambda line: None)
    results, failed = [], {}
    with tempfile.TemporaryDirectory(prefix="triptych-verify-") as folder:
        say("one process (the reference)")
        train = run.train.model_copy(update={"precision": "fp64"})
        single = run.parallel.model_copy(
            update=dict.fromkeys(("pp", "dp_replicate", "dp_shard", "tp", "ep"), 1) | {"recompute": "none"}
        )
        objective, seq_len = build_objective(run), tokens_per_sample(run)
        whole = train.model_copy(update={"micro_batch_size": micro_batch_size(single, run)})
        job = Job(run.model, single, whole, objective, seq_len, samples, folder)
        (reference,) = run_local(1, run_rank, job, None, timeout=timeout)
        for layout in chosen:
            say(f"{layout.text} ({layout.config.world_size} processes)")
            start = time.perf_counter()
            fitted = train.model_copy(update={"micro_batch_size": micro_batch_size(layout.config, run)})
            job = Job(run.model, layout.config, fitted, objective, seq_len, samples, folder)
            try:
                ranks = run_local(layout.config.world_size, run_rank, job, reference, timeout=timeout)
            except Exception as error:
                failed[layout.text] = f"{type(error).__name__}: {error}"
                say(f"{layout.text}: FAILED, {failed[layout.text]}")
                continue
            result = _judge(layout, reference, ranks, tolerance, time.perf_counter() - start)
            results.append(result)
            verdict = "same" if result.ok else "DIFFERENT"
            say(f"{layout.text}: {verdict}, gradient {result.gradient.relative:.1e}")
    return VerifyReport(results, skipped, failed, steps, tolerance, reference.losses)


def _choose(run: RunSections, layouts: Sequence[str] | None) -> tuple[list[LayoutName], dict[str, str]]:
    """The layouts to run; a named one must be legal, one of the default list is dropped with its reason."""
    if layouts:
        chosen = [parse_layout(text, run.parallel) for text in layouts]
        for layout in chosen:
            _check(layout.config, run)
        return chosen, {}
    chosen, skipped = [], {}
    for layout in default_layouts(run.parallel, experts=has_experts(run.model)):
        try:
            _check(layout.config, run)
        except ValueError as error:
            skipped[layout.text] = str(error)
        else:
            chosen.append(layout)
    if not chosen:
        reasons = "; ".join(f"{layout}: {reason}" for layout, reason in skipped.items())
        raise ValueError(
            f"this configuration allows none of the default layouts ({reasons}); name one with --layouts"
        )
    return chosen, skipped


def micro_batch_size(config: ParallelConfig, run: RunSections) -> int:
    """The largest divisor of the run's micro-batch size that lets the layout share the global batch evenly.

    A pipeline gets a micro-batch per stage where there are samples enough, so that 1F1B is what runs. How a
    batch is split belongs to the layout, and what is verified must not depend on it. Where routing needs the
    whole global batch in one pass, it gets that.
    """
    samples = run.train.global_batch_size // Layout(config).dp_size
    if one_pass(build_on_meta(run.model)):
        return samples or run.train.micro_batch_size
    per_stage = samples // config.pp or samples
    return math.gcd(run.train.micro_batch_size, per_stage) or run.train.micro_batch_size


def _check(config: ParallelConfig, run: RunSections) -> None:
    check_layout(run, config, micro_batch_size(config, run))


def _judge(
    layout: LayoutName, reference: RankResult, ranks: Sequence[RankResult], tolerance: float, seconds: float
) -> LayoutResult:
    """The worst over all ranks; a parameter that no rank holds is a defect."""
    losses = [_relative(rank.losses, reference.losses) for rank in ranks]
    norms = [_relative(rank.grad_norms, reference.grad_norms) for rank in ranks]
    names = {name for rank in ranks for name in rank.gradients}
    assert names == reference.gradients.keys(), (
        f"parameters missing: {sorted(reference.gradients.keys() ^ names)}"
    )
    gradient = _worst(worst for rank in ranks for worst in rank.gradients.values())
    parameter = _worst(worst for rank in ranks for worst in rank.parameters.values())
    figures = [*losses, *norms, gradient.relative, parameter.relative]
    # Written so that a NaN is not within the tolerance.
    ok = all(figure <= tolerance for figure in figures)
    return LayoutResult(
        layout.text,
        layout.config.world_size,
        seconds,
        ok,
        _largest(losses),
        _largest(norms),
        gradient,
        parameter,
    )


def _relative(values: Sequence[float], expected: Sequence[float]) -> float:
    return _largest(abs(value - right) / max(abs(right), 1e-300) for value, right in zip(values, expected))


def _worst(candidates: Any) -> Worst:
    return max(candidates, key=lambda worst: _nan_last(worst.relative))


def _largest(values: Any) -> float:
    return max(values, key=_nan_last)


def _nan_last(value: float) -> float:
    """A NaN counts as larger than everything."""
    return value if value == value else float("inf")
