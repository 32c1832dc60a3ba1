"""`triptych experts`: which experts tasks use, leaving out the others, experts for a task more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triptych.launcher.cli_common import Device, Json, show, to_stderr

app = typer.Typer(
    help="Look at, leave out and add experts of a trained run.", no_args_is_help=True, rich_markup_mode=None
)
Run = Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint.")]
Samples = Annotated[
    int | None, typer.Option(help="Validation samples to use, of each source; default: all of them.")
]
BatchSize = Annotated[int, typer.Option(help="Samples at a time.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and write nothing.")]


@app.command()
def use(
    path: Run,
    task: Annotated[str | None, typer.Option(help="This task alone; default: every task.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG to draw: a line per layer and task.")] = None,
    samples: Samples = None,
    batch_size: BatchSize = 32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Share of each task's choices that the experts of each layer get, on the validation data.

    \b
    triptych experts use runs/vision-demo
    triptych experts use runs/vision-demo --task digits --samples 200 --json
    triptych experts use runs/vision-demo --out use.png
    """
    from triptych.tools.experts_use import expert_use

    report = expert_use(
        path,
        task=task,
        out=out,
        samples=samples,
        batch_size=batch_size,
        device=device,
        progress=to_stderr,
    )
    show(report, as_json)


@app.command()
def prune(
    path: Run,
    out: Annotated[Path, typer.Option(help="New run directory.")],
    task: Annotated[
        str | None, typer.Option(help="Task that stays; not needed where there is one alone.")
    ] = None,
    keep_share: Annotated[
        float | None, typer.Option(help="Of the task's choices, that the experts kept must get (0.99).")
    ] = None,
    min_share: Annotated[
        float | None, typer.Option(help="Or: of the task's choices, that an expert needs to be kept.")
    ] = None,
    samples: Samples = None,
    batch_size: BatchSize = 32,
    device: Device = "cpu",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Leave out the experts that a task does not use, and the other tasks; says what that cost.

    \b
    triptych experts prune runs/vision-demo --task digits --out runs/digits-alone
    triptych experts prune runs/vision-demo --task digits --min-share 0.02 --out runs/small --dry-run
    triptych evaluate runs/digits-alone

    What is written evaluates and samples, and another run may start from it (train.finetune.checkpoint).
    """
    from triptych.tools.experts_prune import prune as run

    report = run(
        path,
        out=out,
        task=task,
        keep_share=keep_share,
        min_share=min_share,
        samples=samples,
        batch_size=batch_size,
        device=device,
        dry_run=dry_run,
        progress=to_stderr,
    )
    show(report, as_json)


@app.command("add-task")
def add_task(
    path: Run,
    task: Annotated[str, typer.Option(help="Name of the new task.")],
    kind: Annotated[str, typer.Option(help="classify, segment or detect.")],
    num_classes: Annotated[int, typer.Option(help="Its classes.")],
    out: Annotated[Path, typer.Option(help="New run directory.")],
    experts: Annotated[int, typer.Option(help="Experts more in each layer that has some.")] = 4,
    data: Annotated[
        list[str] | None, typer.Option(help="Shards of the new task; may be given again.")
    ] = None,
    valid: Annotated[
        list[str] | None, typer.Option(help="Its validation shards; may be given again.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Give a vision run a task more with experts of its own; the other tasks' outputs keep every bit.

    \b
    triptych experts add-task runs/demo --task parity --kind classify --num-classes 2 \\
        --data data/parity/train --valid data/parity/valid --out runs/parity
    triptych train runs/parity/config.yaml --run-dir runs/parity-trained
    triptych evaluate runs/parity-trained

    Everything old is frozen (train.freeze); what is trained are the new experts, gates and head.
    """
    from triptych.tools.experts_add import add_task as run

    report = run(
        path,
        out=out,
        task=task,
        kind=kind,
        num_classes=num_classes,
        experts=experts,
        data=data or (),
        valid=valid or (),
        dry_run=dry_run,
    )
    show(report, as_json)
