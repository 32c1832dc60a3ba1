"""The command line: verbs that parse options and call a room. Heavy imports stay inside the verbs."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.launcher.errors import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    RunFailed,
    Terminated,
    exit_code,
    is_meant,
)

if TYPE_CHECKING:
    from triptych.launcher.config import RunConfig

app = typer.Typer(
    name="triptych",
    help="Distributed training whose losses do not depend on the layout. Start with `triptych train --help`.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every verb takes --debug: the traceback of an error.",
)
data_app = typer.Typer(help="Make corpora.", no_args_is_help=True, rich_markup_mode=None)
bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

Words = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG [KEY=VALUE]...", help="A YAML file, then dotted overrides of its keys."),
]
OptionalWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file, then dotted overrides of its keys."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")]


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, start nothing.")] = False,
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
    config = _load(words)
    if print_config:
        sys.stdout.write(config.to_yaml())
        return
    from triptych.tools.describe import describe as run

    _show(run(config), as_json)


@data_app.command()
def text(
    out: Annotated[Path, typer.Option(help="Directory of the corpus.")],
    source: Annotated[
        list[str] | None,
        typer.Option(help="stdlib, or a file or directory of text, JSONL or Parquet; may be given again."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary of the byte-level BPE to train.")] = 512,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json to use in place of training one.")
    ] = None,
    valid_share: Annotated[
        float, typer.Option(help="Share of the documents held out for validation.")
    ] = 0.05,
    jsonl_key: Annotated[str, typer.Option(help="Key of a JSON line that holds the document.")] = "text",
    parquet_column: Annotated[
        str, typer.Option(help="Column of a Parquet file that holds the documents.")
    ] = "text",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse bad documents instead of counting them.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenize; default: one per core.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a corpus made with other options.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a corpus (Megatron .bin/.idx) and its tokenizer from text; a complete one is reused.

    \b
    triptych data text --source stdlib --vocab-size 512 --out data/stdlib-512
    triptych data text --source notes/ --source more.jsonl --tokenizer tokenizer.json --out data/mine
    """
    from triptych.launcher import run

    options = {
        "source": source or ["stdlib"],
        "out": str(out),
        "vocab_size": vocab_size,
        "tokenizer": str(tokenizer) if tokenizer else None,
        "valid_share": valid_share,
        "jsonl_key": jsonl_key,
        "parquet_column": parquet_column,
        "strict": strict,
        "workers": workers,
        "overwrite": overwrite,
    }
    run.text_corpus(options, as_json=as_json)


@app.command()
def verify(
    words: Words,
    layouts: Annotated[
        list[str] | None,
        typer.Option(help="Layouts such as tp2, tp2.pp2 (or tp2,pp2) and dp_shard2+selective. Default: ten."),
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
        _load([*config, *others]),
        wanted or None,
        steps=steps,
        tolerance=tolerance,
        synthetic=synthetic,
        timeout=timeout,
        progress=_to_stderr,
    )
    _show(report, as_json)
    if not report.ok:
        raise RunFailed(f"a layout differs from one process by more than {tolerance:g}")


@app.command()
def sample(
    path: Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given again.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens of this mass.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    device: Device = "cpu",
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; default: the run's own.")] = None,
    as_json: Json = False,
) -> None:
    """Let a trained language model continue text.

    \b
    triptych sample runs/demo --prompt "def __init__(self" --prompt "import os"
    triptych sample runs/demo --prompt "class" --temperature 0 --max-new-tokens 32
    """
    from triptych.tools.sample import sample as run

    texts = run(
        path,
        prompts=prompt or [""],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=device,
        tokenizer=tokenizer,
    )
    if as_json:
        typer.echo(json.dumps(texts))
        return
    for number, continuation in enumerate(texts):
        typer.echo(("" if number == 0 else "-" * 40 + "\n") + continuation)


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint.")],
    samples: Annotated[
        int | None, typer.Option(help="Validation sequences; default: as the run did.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also a bigram model, on the same targets.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 8,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Validation loss of a checkpoint.

    \b
    triptych evaluate runs/demo --baseline
    triptych evaluate runs/demo/checkpoints/step-00000100 --samples 256 --json
    """
    from triptych.tools.evaluate import evaluate as run

    report = run(
        path, samples=samples, baseline=baseline, batch_size=batch_size, device=device, progress=_to_stderr
    )
    _show(report, as_json)


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

    _show(run(runs), as_json)


@bench_app.command("train")
def bench_train(
    repeats: Annotated[int, typer.Option(help="Timed runs of each side.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads of each side; default: the cores.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes: shows that it works, not how fast.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Speed and memory of training beside transformers, in one run (needs pip install 'triptych[hf]').

    \b
    triptych bench train
    triptych bench train --quick --json

    Exit code 1 if a target is missed (not with --quick).
    """
    from triptych.tools.bench import bench_train as run

    report = run(repeats=repeats, threads=threads, quick=quick, progress=_to_stderr)
    _show(report, as_json)
    if not quick and not report.ok:
        raise RunFailed("a target was missed")


@bench_app.command("activations")
def bench_activations(
    processes: Annotated[bool, typer.Option("--processes", help="Count in real gloo processes.")] = False,
    as_json: Json = False,
) -> None:
    """Bytes that autograd keeps for one block, per layout and recomputation, beside the published formulas.

    \b
    triptych bench activations
    """
    from triptych.tools.activations import activation_report as run

    _show(run(processes=processes, progress=_to_stderr), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed, which devices there are, and which kernels would run and why.

    \b
    triptych doctor
    """
    from triptych.launcher.doctor import examine

    report = examine()
    _show(report, as_json)
    if not report.ok:
        raise RunFailed("something that training needs is missing, see above")


def _load(words: list[str]) -> RunConfig:
    from triptych.launcher.config import load

    return load(words[0], words[1:])


def _show(report: Any, as_json: bool) -> None:
    """A report's table for people, its JSON for programs."""
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 110
    Console(width=width).print(report.table())


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)


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
