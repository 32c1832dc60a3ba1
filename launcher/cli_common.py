"""What the verbs share: common options, loading and showing."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from triptych.launcher.config import RunConfig

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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, start nothing.")]


def load(words: list[str]) -> RunConfig:
    """The configuration of CONFIG [KEY=VALUE]..."""
    from triptych.launcher.config import load as read

    return read(words[0], words[1:])


def show(report: Any, as_json: bool) -> None:
    """A report's table for people, its JSON for programs."""
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 110
    Console(width=width).print(report.table())


def to_stderr(line: str) -> None:
    """Progress in words, out of the way of what a program reads."""
    typer.echo(line, err=True)
