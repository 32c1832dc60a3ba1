"""The command line: verbs that parse options and call a room. Heavy imports stay inside the verbs."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from triptych.launcher import cli_bench, cli_data, cli_experts, cli_samples
from triptych.launcher.cli_common import (
    DryRun,
    Json,
    OptionalWords,
    PrintConfig,
    Words,
    load,
    show,
    to_stderr,
)
from triptych.launcher.errors import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    RunFailed,
    Terminated,
    exit_code,
    is_meant,
)

app = typer.Typer(
    name="triptych",
    help="Distributed training whose losses do not depend on the layout. Start with `triptych train --help`.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every verb takes --debug: the traceback of an error.",
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_experts.app, name="experts")
app.command()(cli_samples.sample)
app.command()(cli_samples.evaluate)


@app.command()
def train(
    words: OptionalWords = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run directory; one that exists is resumed. Default: runs/<name>-<time>."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run directory to go on with, by its own configuration plus overrides."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, as cluster.address.")] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="One rank, in this process, without Ray.")
    ] = False,
    dry_run: DryRun = False,
    print_config: PrintConfig = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on the last line.")
    ] = False,
) -> None:
    """Train a model on this machine or on a Ray cluster.

    \b
    triptych train configs/lm/demo.yaml
    triptych train configs/lm/demo.yaml parallel.tp=1 parallel.pp=2 train.steps=200
    triptych train configs/lm/demo.yaml --run-dir runs/a     (again: resumes runs/a)
    triptych train --resume runs/a train.steps=400
    triptych train configs/lm/hybrid-1b.yaml --address auto
    triptych train configs/lm/tiny.yaml --in-process

    A worker that dies is replaced, and training goes on from the newest checkpoint (cluster.max_failures).
    Ctrl-C stops everything. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 Ctrl-C.
    """
    from triptych.launcher import run

    config, directory = run.resolve(words or [], run_dir=run_dir, resume=resume, address=address)
    if print_config:
        sys.stdout.write(config.to_yaml())
        return
    run.preflight(config, in_process=in_process)
    if dry_run:
        run.show_plan(config, directory)
        return
    result = run.train(config, directory, in_process=in_process)
    if as_json:
        typer.echo(json.dumps(result))


@app.command()
def describe(words: Words, as_json: Json = False, print_config: PrintConfig = False) -> None:
    """Show what a configuration means, with nothing allocated: parameters, FLOPs, memory, batch, layout.

    \b
    triptych describe configs/lm/demo.yaml
    triptych describe configs/lm/hybrid-1b.yaml parallel.tp=8 --json
    """
    config = load(words)
    if print_config:
        sys.stdout.write(config.to_yaml())
        return
    from triptych.tools.describe import describe as run

    show(run(config), as_json)


@app.command()
def verify(
    words: Words,
    layouts: Annotated[
        list[str] | None,
        typer.Option(
            help="Layouts such as tp2, tp2.pp2 (or tp2,pp2) and dp_shard2+selective. "
            "Default: ten, and six more with experts."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps after which parameters are compared.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference allowed.")] = 1e-9,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Random tokens instead of the corpus.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for each layout.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Prove in float64, with real processes, that every layout trains the same as one process.

    \b
    triptych verify configs/lm/tiny.yaml
    triptych verify configs/lm/tiny.yaml --layouts tp2 pp2 dp2 tp2.pp2.dp2+full --synthetic

    Exit code 1 if any layout differs.
    """
    from triptych.tools.verify import verify as run

    # An option takes one word; further layouts arrive among the words, where they alone lack a "=".
    config, others = words[:1], words[1:]
    wanted = [name for item in layouts or [] for name in item.split()]
    if wanted:
        wanted += [word for word in others if "=" not in word]
        others = [word for word in others if "=" in word]
    report = run(
        load([*config, *others]),
        wanted or None,
        steps=steps,
        tolerance=tolerance,
        synthetic=synthetic,
        timeout=timeout,
        progress=to_stderr,
    )
    show(report, as_json)
    if not report.ok:
        raise RunFailed(f"a layout differs from one process by more than {tolerance:g}")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run directories; the first is the yardstick.")
    ],
    as_json: Json = False,
) -> None:
    """Training losses of runs side by side, at the steps that all of them logged.

    \b
    triptych compare runs/one-rank runs/tp2
    triptych compare runs/a runs/b runs/c --json
    """
    from triptych.tools.compare import compare as run

    show(run(runs), as_json)


@app.command()
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Hold every kernel that can run here against its reference.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is installed, which devices there are, and which kernels would run and why.

    \b
    triptych doctor
    triptych doctor --kernels

    A run checks what it did not compile itself in the same way before it uses it, and does without what
    fails; --kernels names it beforehand.
    """
    from triptych.launcher.doctor import examine

    report = examine(check_kernels=kernels)
    show(report, as_json)
    if not report.ok:
        raise RunFailed("something that training needs is missing, see above")


def main() -> None:
    """The `triptych` command."""
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: list[str]) -> int:
    """Run one command line and tell its error in the way it deserves; returns the exit code.

    Bad input and failed runs get a message; a traceback is for our own defects, and for --debug.
    """
    debug = "--debug" in arguments or os.environ.get("TRIPTYCH_DEBUG", "0") not in ("", "0")
    try:
        code = app([word for word in arguments if word != "--debug"], standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped by Ctrl-C", err=True)
        return INTERRUPTED
    except Terminated:
        typer.echo("stopped by SIGTERM", err=True)
        return FAILED
    except BrokenPipeError:  # the reader, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if hasattr(error, "show"):  # a usage error of click, which newer typers carry within them
            error.show(file=sys.stderr)
            return BAD_INPUT
        _tell(error, debug)
        return exit_code(error)


def _tell(error: Exception, debug: bool) -> None:
    if debug or not is_meant(error):
        typer.echo(getattr(error, "details", "") or traceback.format_exc(), err=True)
    if isinstance(error, RunFailed) or is_meant(error):
        typer.echo(f"error: {error}", err=True)
    if not is_meant(error):
        typer.echo("error: a defect of triptych, or of something below it; see the traceback", err=True)


if __name__ == "__main__":
    main()
