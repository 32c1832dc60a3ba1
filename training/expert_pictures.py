"""Expert use as numbers and pictures: which share of the tokens each expert got, layer by layer, task by
task.

Shape legend: R rows (a layer, or a task in a layer), E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from triptych.training.pictures import Pictures

RouterFigures = dict[str, Any]
"""What `models.routers.Router.figures` returns."""

_CELL, _LINE, _GAP, _MARGIN = 18, 16, 6, 8
_SCALE = "share / mean"
_BLACK, _GREY = (20, 20, 20), (90, 90, 90)
_FULL = np.array([38, 70, 150], dtype=np.float64)
_EMPTY = np.array([245, 245, 240], dtype=np.float64)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts blocks.2 before blocks.10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def scalars_of(routing: Mapping[str, RouterFigures]) -> dict[str, float]:
    """`blocks.1.ffn/dropped` and the like."""
    found: dict[str, float] = {}
    for name, figures in routing.items():
        layer = name.removesuffix(".router")
        load: torch.Tensor = figures["load"]
        mean = max(float(load.mean()), 1e-12)
        found[f"{layer}/dropped"] = figures["dropped"]
        found[f"{layer}/entropy"] = figures["entropy"]
        found[f"{layer}/busiest"] = float(load.max()) / mean
        found[f"{layer}/idlest"] = float(load.min()) / mean
        found |= {f"{layer}/{loss}": value for loss, value in figures["losses"].items()}
    return found


def load_pictures(routing: Mapping[str, RouterFigures]) -> dict[str, Pictures]:
    """By TensorBoard tag: the load of the experts of each layer; with several tasks also by task."""
    rows = {name.removesuffix(".router"): figures["load"] for name, figures in routing.items()}
    pictures = {"experts/load": load_picture(rows)}
    tasks = next(iter(routing.values()))["task_load"]
    if len(tasks) > 1:
        pictures["experts/load_by_task"] = load_picture(by_task(routing))
    return pictures


def by_task(routing: Mapping[str, RouterFigures]) -> dict[str, torch.Tensor]:
    """ "layer  task" -> shares of the experts, the tasks of a layer below each other."""
    return {
        f"{name.removesuffix('.router')}  {task}": load
        for name, figures in routing.items()
        for task, load in figures["task_load"].items()
    }


def load_picture(rows: Mapping[str, torch.Tensor]) -> Pictures:
    """A line per row, a cell per expert, darker for more tokens; uint8 (H, W, 3).

    rows: label -> shares (E,); rows may differ in E. Of labels "layer  task" the layer is written once, and
    layers stand apart. The darkest cell has twice the mean share of its row or more, which a scale below
    says.
    """
    labels = [label.partition("  ") for label in rows]
    firsts = [n == 0 or labels[n][0] != labels[n - 1][0] for n in range(len(labels))]
    gap = 0 if all(firsts) else _GAP
    second = _MARGIN + max(_width(layer) for layer, _, _ in labels)
    left = max(second + max(_width(task) for _, _, task in labels), _MARGIN + _width(_SCALE))
    widest = max(len(shares) for shares in rows.values())
    # The scale below has a place for ten cells.
    width = left + max(widest, 10) * _CELL + _MARGIN
    image = Image.new("RGB", (width, (len(rows) + 2) * _LINE + gap * sum(firsts) + 2 * _MARGIN), _colour(0))
    draw = ImageDraw.Draw(image)
    for expert in range(0, widest, 2):
        middle = (left + expert * _CELL + _CELL // 2 - 1, _LINE // 2)
        draw.text(middle, str(expert), fill=_GREY, anchor="mm")
    top = _LINE + 2
    for (layer, _, task), first, shares in zip(labels, firsts, rows.values()):
        top += gap * first
        draw.text((_MARGIN, top), layer if first else "", fill=_BLACK)
        draw.text((second, top), task, fill=_BLACK)
        for expert, share in enumerate((shares.double() * len(shares) / 2).clamp(0, 1).tolist()):
            _cell(draw, left + expert * _CELL, top, share)
        top += _LINE
    top += _MARGIN
    draw.text((_MARGIN, top), _SCALE, fill=_GREY)
    for place, mark in enumerate(("0", "1/2", "1", "3/2", "2+")):
        _cell(draw, left + 2 * place * _CELL, top, place / 4)
        draw.text((left + (2 * place + 1) * _CELL, top), mark, fill=_GREY)
    return np.asarray(image)


def _width(text: str) -> int:
    """Pixels of a column of such texts."""
    return math.ceil(ImageFont.load_default().getlength(text)) + _MARGIN if text else 0


def _cell(draw: ImageDraw.ImageDraw, left: int, top: int, share: float) -> None:
    """share: of the darkest colour."""
    box = (left, top, left + _CELL - 3, top + _LINE - 3)
    draw.rectangle(box, fill=_colour(share), outline=(200, 200, 195))


def _colour(share: float) -> tuple[int, ...]:
    return tuple(int(v) for v in _EMPTY + share * (_FULL - _EMPTY))
