"""`triptych data`: from options to a corpus, with progress."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Options = TypeVar("Options", bound=BaseModel)
Advance = Callable[[str, int, int], None]


def text_corpus(options: dict[str, Any], *, as_json: bool = False) -> None:
    """Build or reuse a text corpus and show what it holds."""
    from triptych.data_pipeline.config import TextCorpusOptions
    from triptych.data_pipeline.text import build_text_corpus

    checked = _checked(TextCorpusOptions, options)
    with _bars() as advance:
        report = build_text_corpus(checked, advance)
    _tell(report, as_json)


def images(
    kind: Literal["digits", "images", "coco", "masks", "latents"],
    options: dict[str, Any],
    *,
    as_json: bool = False,
) -> None:
    """Build or reuse shards of images or latents and show what they hold."""
    from triptych.data_pipeline.images import coco, digits, folder, latents, masks
    from triptych.data_pipeline.images import options as schemas

    with _bars() as advance:
        if kind == "digits":
            report = digits.build_digits(_checked(schemas.DigitsOptions, options), advance)
        elif kind == "images":
            report = folder.build_image_folder(_checked(schemas.ImageFolderOptions, options), advance)
        elif kind == "coco":
            report = coco.build_coco(_checked(schemas.CocoOptions, options), advance)
        elif kind == "masks":
            report = masks.build_masks(_checked(schemas.MaskOptions, options), advance)
        else:
            report = latents.build_latents(_checked(schemas.LatentsOptions, options), advance)
    _tell(report, as_json)


def size_of(text: str) -> tuple[int, int]:
    """(256, 192) of "256x192". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"size {text!r} is not HEIGHTxWIDTH; write for example 256x192")
    return int(match[1]), int(match[2])


def _checked(schema: type[Options], options: dict[str, Any]) -> Options:
    try:
        return schema.model_validate(options)
    except ValidationError as error:
        wrong = [f"{_option(item['loc'])}{item['msg']}" for item in error.errors()]
        raise ValueError("; ".join(wrong)) from error


def _option(location: tuple[int | str, ...]) -> str:
    return f"--{str(location[0]).replace('_', '-')}: " if location else ""


@contextlib.contextmanager
def _bars() -> Iterator[Advance]:
    """A bar for each stage on a terminal, a line elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(f"{stage} ...", markup=False)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def _tell(report: Any, as_json: bool) -> None:
    print(json.dumps(dataclasses.asdict(report)) if as_json else report.summary())
