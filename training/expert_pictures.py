"""Expert use as numbers and pictures: which share of the tokens each expert got, layer by layer, task by
task.

Shape legend: R rows (a layer, or a task in a layer), E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from triptych.training.pictures import Pictures

RouterFigures = dict[str, Any]
"""What `models.routers.Router.figures` returns."""

_CELL, _LABEL, _LINE = 18, 190, 16
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

    rows: label -> shares (E,); rows may differ in E. The darkest cell has twice the mean share of its row or
    more.
    """
    widest = max(len(shares) for shares in rows.values())
    width, height = _LABEL + widest * _CELL + _LINE, (len(rows) + 1) * _LINE + 8
    image = Image.new("RGB", (width, height), tuple(int(v) for v in _EMPTY))
    draw = ImageDraw.Draw(image)
    for expert in range(0, widest, 2):
        draw.text((_LABEL + expert * _CELL + 3, 2), str(expert), fill=(90, 90, 90))
    for line, (label, shares) in enumerate(rows.items(), start=1):
        top = line * _LINE + 2
        draw.text((4, top), label, fill=(20, 20, 20))
        darkness = (shares.double() * len(shares) / 2).clamp(0, 1).tolist()
        for expert, share in enumerate(darkness):
            left = _LABEL + expert * _CELL
            colour = tuple(int(v) for v in _EMPTY + share * (_FULL - _EMPTY))
            box = (left, top, left + _CELL - 2, top + _LINE - 3)
            draw.rectangle(box, fill=colour, outline=(200, 200, 195))
    return np.asarray(image)
