"""Several digits on a canvas, with boxes or a mask: images for detection and segmentation from images of one
digit.

Image n is a function of the digits, the seed, the purpose and n. One to four digits, each between three
eighths and half of the canvas high (at least 8 pixels), stand where none covers another, on faint noise.

S edge of the canvas, K digits on it
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.draws import uniforms
from triptych.data_pipeline.order import key

_MOST_DIGITS = 4
_TRIES = 100
_NOISE = 24
# From this shade on, of 255, a pixel is ink.
_INK = 64

# Directions in which an outline is held: those of a polygon with so many sides.
_ANGLES = np.arange(16) * (2 * np.pi / 16)
_DIRECTIONS = np.stack([np.sin(_ANGLES), np.cos(_ANGLES)])  # (2, 16), of y and x


@dataclass(frozen=True)
class Canvas:
    """An image of several digits and what is known of it."""

    image: npt.NDArray[np.uint8]
    """(S, S)"""
    boxes: npt.NDArray[np.int64]
    """(K, 4) x0, y0, x1, y1 around the ink of each digit."""
    labels: npt.NDArray[np.int64]
    """(K,)"""
    mask: npt.NDArray[np.uint8]
    """(S, S) 0: background, 1 + digit: within the outline of a digit, the polygon drawn tightly around it."""


def resized(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """(size, size), bicubic."""
    from PIL import Image

    if image.shape == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def compose(
    digits: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], size: int, seed: int, purpose: str, n: int
) -> Canvas:
    """Canvas n of `size` pixels each way; digits: (N, h, h) shades 0 .. 255 to choose from, labels: (N,)."""
    canvas_key = key("canvas", seed, purpose, n)
    image = (uniforms(canvas_key, "noise", size * size) * _NOISE).astype(np.uint8).reshape(size, size)
    mask = np.zeros((size, size), np.uint8)
    cells: list[tuple[int, int, int]] = []
    boxes, found = [], []
    for k in range(1 + int(uniforms(canvas_key, "count", 1)[0] * _MOST_DIGITS)):
        which, scale, *places = uniforms(canvas_key, f"digit {k}", 2 + 2 * _TRIES)
        edge = round(max(8.0, size * (0.375 + 0.125 * scale)))
        cell = _free_cell(np.reshape(places, (_TRIES, 2)), edge, size, cells)
        if cell is None:
            continue
        cells.append(cell)
        top, left, _ = cell
        chosen = int(which * len(digits))
        shades = resized(digits[chosen], edge)
        part = np.s_[top : top + edge, left : left + edge]
        image[part] = np.maximum(image[part], shades)
        ink = np.argwhere(shades >= _INK)
        mask[part][_outline(ink, edge)] = 1 + labels[chosen]
        (y0, x0), (y1, x1) = ink.min(axis=0), ink.max(axis=0) + 1
        boxes.append([left + x0, top + y0, left + x1, top + y1])
        found.append(labels[chosen])
    return Canvas(image, np.array(boxes, np.int64), np.array(found, np.int64), mask)


def _free_cell(
    places: npt.NDArray[np.float64], edge: int, size: int, taken: list[tuple[int, int, int]]
) -> tuple[int, int, int] | None:
    """(top, left, edge) of the first place that no cell taken reaches into."""
    for top, left in (places * (size - edge + 1)).astype(int).tolist():
        if all(
            top >= y + other or y >= top + edge or left >= x + other or x >= left + edge
            for y, x, other in taken
        ):
            return top, left, edge
    return None


def _outline(ink: npt.NDArray[np.int64], edge: int) -> npt.NDArray[np.bool_]:
    """(edge, edge) pixels within the polygon around ink (n, 2); where they lie in all directions behind
    it."""
    pixels = np.indices((edge, edge)).reshape(2, -1).T
    reach = (ink @ _DIRECTIONS).max(axis=0)
    inside: npt.NDArray[np.bool_] = (pixels @ _DIRECTIONS <= reach + 1e-9).all(axis=1)
    return inside.reshape(edge, edge)
