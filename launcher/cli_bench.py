"""`triptych bench`: measurements beside peers, each in one run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from triptych.launcher.cli_common import Json, show, to_stderr
from triptych.launcher.errors import RunFailed

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)
Repeats = Annotated[int, typer.Option(help="Timed runs of each side.")]
Threads = Annotated[int | None, typer.Option(help="Threads of each side; default: the cores.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny shapes: shows that it works, not how fast.")]


def _judge(report: Any, quick: bool, as_json: bool) -> None:
    """Show a report of ratios. Raises RunFailed for a target missed, which tiny shapes may."""
    show(report, as_json)
    if not quick and not report.ok:
        raise RunFailed("a target was missed")


@app.command("train")
def bench_train(
    repeats: Repeats = 5,
    threads: Threads = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Speed and memory of training beside transformers, in one run (needs pip install 'triptych[hf]').

    \b
    triptych bench train
    triptych bench train --quick --json

    Exit code 1 if a target is missed (not with --quick).
    """
    from triptych.tools.bench import bench_train as run

    _judge(run(repeats=repeats, threads=threads, quick=quick, progress=to_stderr), quick, as_json)


@app.command("activations")
def bench_activations(
    processes: Annotated[bool, typer.Option("--processes", help="Count in real gloo processes.")] = False,
    as_json: Json = False,
) -> None:
    """Bytes that autograd keeps for one block, per layout and recomputation, beside the published formulas.

    \b
    triptych bench activations
    """
    from triptych.tools.activations import activation_report as run

    show(run(processes=processes, progress=to_stderr), as_json)


@app.command("diffusion")
def bench_diffusion(
    repeats: Repeats = 5,
    threads: Threads = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """A step of DiT-S/2 beside the plain PyTorch formulation, and with TREAD beside without, in one run.

    \b
    triptych bench diffusion
    triptych bench diffusion --quick --json

    Exit code 1 if a target is missed (not with --quick).
    """
    from triptych.tools.bench_diffusion import bench_diffusion as run

    _judge(run(repeats=repeats, threads=threads, quick=quick, progress=to_stderr), quick, as_json)


@app.command("moe")
def bench_moe(
    repeats: Repeats = 7,
    threads: Threads = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Mixture of experts beside a loop over experts and beside all experts, and product keys, in one run.

    \b
    triptych bench moe
    triptych bench moe --quick --json

    Exit code 1 if a target is missed (not with --quick).
    """
    from triptych.tools.bench_moe import bench_moe as run

    _judge(run(repeats=repeats, threads=threads, quick=quick, progress=to_stderr), quick, as_json)
