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


@app.command("kernels")
def bench_kernels(
    op: Annotated[list[str] | None, typer.Option(help="An operator; may be given several times.")] = None,
    against: Annotated[
        str, typer.Option(help="Peers or forms, with commas between; default: all there are.")
    ] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on the CPU, bfloat16 on a GPU.")] = None,
    plot: Annotated[str | None, typer.Option(help="A PNG of the ratios to write.")] = None,
    compile_for: Annotated[
        str | None,
        typer.Option(help="Only compile Triton's kernels, for sm_80 or sm_90; needs no GPU, times nothing."),
    ] = None,
    repeats: Repeats = 7,
    threads: Threads = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Operators beside other packages and plain PyTorch: time, memory, bandwidth, correctness, in one run.

    \b
    triptych bench kernels
    triptych bench kernels --op ssd --op selective_scan --plot kernels.png
    triptych bench kernels --against mamba_ssm,fla,liger --device cuda --json
    triptych bench kernels --compile-for sm_90

    Each side is held against a float64 reference before it is timed. Exit code 1 if a target is missed (not
    with --quick).
    """
    if compile_for is not None:
        from triptych.tools.kernel_bench.compiled import compiled_kernels

        compiled = compiled_kernels(compile_for, ops=op or [], dtype=dtype or "bfloat16", progress=to_stderr)
        _judge(compiled, quick, as_json)
        return
    from triptych.tools.bench_kernels import bench_kernels as run

    report = run(
        ops=op or [],
        against=[name.strip() for name in against.split(",") if name.strip()],
        device=device,
        dtype=dtype,
        repeats=repeats,
        threads=threads,
        quick=quick,
        plot=plot,
        progress=to_stderr,
    )
    _judge(report, quick, as_json)
