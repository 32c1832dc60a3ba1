"""What a vision model says about some images, drawn: class names, masks, boxes.

Truth is green and predictions are orange. Shape legend: B samples, C channels, H and W pixels.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from triptych.models.vision_config import VisionConfig
from triptych.training.objectives.vision.losses import Targets, upsampled, widened
from triptych.training.objectives.vision.objective import members
from triptych.training.objectives.vision.precision import find_boxes
from triptych.training.pictures import Pictures, grid, to_uint8

SIDE = 128
"""Pixels that pictures are enlarged to, by a whole factor."""
SHOWN_SCORE = 0.3
"""Of the least certain boxes drawn."""
TRUE, PREDICTED, BACK = (60, 200, 80), (255, 150, 30), (0, 0, 0)
_LINE = 12
"""Height of a line of text."""

Names = Mapping[str, Sequence[str]]


@torch.no_grad()
def task_pictures(
    model: VisionConfig,
    x: Tensor,
    outputs: Sequence[Tensor],
    targets: Targets,
    *,
    names: Names | None = None,
    count: int = 8,
    columns: int = 4,
) -> dict[str, Pictures]:
    """One picture (H', W', 3) for each task that has samples in the batch, of its first `count`.

    x: (B, C, H, W) in [-1, 1], or video (B, C, frames, H, W), of which the middle frame is drawn. outputs,
    targets:
    as VisionObjective.loss gets them. names: of each task's classes, their numbers where a task has none.
    classify: true class above, predicted one below. segment: image, mask, prediction side by side. detect:
    both boxes. contrast: hit or miss. Packed rows give no pictures.
    """
    if targets["valid"].ndim > 1:
        return {}
    drawn: dict[str, Pictures] = {}
    for number, (name, task) in enumerate(model.tasks.items()):
        rows = members(targets, number).nonzero().squeeze(1)[:count].tolist()
        if not rows:
            continue
        labels = _Labels((names or {}).get(name, ()))
        draw = functools.partial(_DRAWN[task.kind], labels=labels, model=model)
        drawn[name] = grid(
            np.stack([draw(x[row], outputs[number][row], targets, row) for row in rows]), columns
        )
    return drawn


class _Labels:
    """Names of classes."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __getitem__(self, label: int) -> str:
        if label < 0:
            return "none"
        return self.names[label] if label < len(self.names) else str(label)


def _classify(
    x: Tensor, output: Tensor, targets: Targets, row: int, *, labels: _Labels, model: VisionConfig
) -> Pictures:
    share, label = widened(output).softmax(dim=0).max(dim=0)
    true = int(targets["labels"][row])
    said = f"{labels[int(label)]} {float(share):.0%}"
    return _captioned(_enlarged(x), [(labels[true], TRUE), (said, TRUE if int(label) == true else PREDICTED)])


def _contrast(
    x: Tensor, output: Tensor, targets: Targets, row: int, *, labels: _Labels, model: VisionConfig
) -> Pictures:
    loss, hit = widened(output).tolist()
    return _captioned(_enlarged(x), [(f"{'hit' if hit else 'miss'} {loss:.2f}", TRUE if hit else PREDICTED)])


def _segment(
    x: Tensor, output: Tensor, targets: Targets, row: int, *, labels: _Labels, model: VisionConfig
) -> Pictures:
    mask = targets["masks"][row]
    said = upsampled(output.unsqueeze(0), mask.shape)[0].argmax(dim=0)
    picture = _enlarged(x)
    size = (picture.width, picture.height)
    parts = [np.asarray(picture)]
    for classes in (mask, said):
        colours = Image.fromarray(_palette(output.shape[0])[classes.cpu().numpy()])
        parts.append(np.asarray(colours.resize(size, Image.Resampling.NEAREST)))
    return np.concatenate(parts, axis=1)


def _detect(
    x: Tensor, output: Tensor, targets: Targets, row: int, *, labels: _Labels, model: VisionConfig
) -> Pictures:
    picture = _enlarged(x)
    factor = picture.width / x.shape[-1]
    canvas = ImageDraw.Draw(picture)
    true = targets["box_labels"][row] >= 0
    boxes, found_labels = targets["boxes"][row][true], targets["box_labels"][row][true]
    for box, label in zip((boxes * factor).tolist(), found_labels.tolist(), strict=True):
        canvas.rectangle(box, outline=TRUE)
        _write(canvas, (box[0] + 2, box[3] - _LINE), labels[label], TRUE)
    found = find_boxes(widened(output), targets["points"], model.dense_stride)
    shown = found.scores > SHOWN_SCORE
    for box, label in zip((found.boxes[shown] * factor).tolist(), found.labels[shown].tolist(), strict=True):
        canvas.rectangle(box, outline=PREDICTED)
        _write(canvas, (box[0] + 2, box[1]), labels[label], PREDICTED)
    return np.asarray(picture)


_DRAWN = {"classify": _classify, "segment": _segment, "detect": _detect, "contrast": _contrast}


def _enlarged(x: Tensor) -> Image.Image:
    """(C, *space) in [-1, 1] -> a picture in red, green and blue; pixels that are not finite are grey."""
    frame = x if x.ndim == 3 else x[:, x.shape[1] // 2]
    channels = frame[:3] if len(frame) >= 3 else frame[:1].expand(3, -1, -1)
    pixels = to_uint8(torch.nan_to_num(channels, nan=0.0, posinf=0.0, neginf=0.0).unsqueeze(0))[0]
    factor = max(1, SIDE // max(pixels.shape[:2]))
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _captioned(picture: Image.Image, lines: list[tuple[str, tuple[int, int, int]]]) -> Pictures:
    """The picture over lines of text."""
    whole = Image.new("RGB", (picture.width, picture.height + _LINE * len(lines) + 2), BACK)
    whole.paste(picture)
    canvas = ImageDraw.Draw(whole)
    for number, (text, colour) in enumerate(lines):
        _write(canvas, (2, picture.height + number * _LINE), text, colour)
    return np.asarray(whole)


def _write(
    canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: tuple[int, int, int]
) -> None:
    # The built-in font knows Latin letters alone, in some builds of Pillow.
    known = text.encode("latin-1", "replace").decode("latin-1")
    canvas.text(place, known, fill=colour, font=ImageFont.load_default())


def _palette(classes: int) -> Pictures:
    """A colour for each class, and grey at the end, where -1 finds it: (classes + 1, 3)."""
    # Turns of the golden ratio around the circle of hues never meet again.
    hues = [colorsys.hsv_to_rgb(0.618034 * number % 1, 0.75, 0.95) for number in range(1, classes)]
    colours = [(0.0, 0.0, 0.0), *hues, (0.5, 0.5, 0.5)]
    return np.rint(np.array(colours) * 255).astype(np.uint8)
