"""Scan orders: in which order a sequence model visits the tokens of a grid of 1, 2 or 3 sides.

An order is written as a base with an argument after ":" where it takes one, and modifiers after "+":
"raster", "zigzag:3", "window:4+flip_w", "hilbert+reverse". Bases, n being the number of the grid's sides:

- raster: the last axis innermost (row by row).
- column: the axes the other way round (column by column).
- axis:k: axis k innermost, the others as in raster (Mamba-ND, arXiv 2402.05892).
- zigzag, zigzag:i (alias of the first: snake): raster in which every other line runs backwards, so that all
  steps are unit steps. i counts first the n! orders of the axes, then the 2^n corners to begin at: 2 in 1-D,
  48 in 3-D, and in 2-D the 8 paths of ZigMa (arXiv 2403.13802) under its numbers.
- window:W: raster of windows of W tokens a side, raster in each; the last windows may be smaller.
- hilbert: a Hilbert curve. Steps are unit steps in 1-D and 2-D, and in 3-D where all sides are even or one is
  1; else a few are diagonal (models/hilbert.py).
- multiscale:S: coarse to fine: tokens whose coordinates are all multiples of 2^S, then those of 2^(S-1) that
  have not been visited, down to the rest; each in raster order.

Modifiers: +flip:k mirrors axis k of the grid before it is ordered, +flip_w the last axis and +flip_h the last
but one; +reverse turns the order round. What stands twice cancels.

Legend: T tokens, L lines.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from triptych.models.hilbert import hilbert_path

MAX_AXES = 3
ORDERS_IN_CACHE = 2048


class _Base(NamedTuple):
    """visit: (token numbers as an array of the grid's shape, argument) -> them in the order of visits.
    least: smallest argument, None where the base takes none. default: argument that need not be written.
    limit: (number of axes, argument) -> None, or what is wrong. line_axis: (number of axes, argument) -> the
    axis along which its lines run; None where it has no lines.
    """

    visit: Callable[[np.ndarray, int], np.ndarray]
    least: int | None = None
    default: int | None = None
    limit: Callable[[int, int], str | None] = lambda axes, argument: None
    line_axis: Callable[[int, int], int] | None = None


def _along(grid: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(grid, axis, -1).ravel()


def _zigzag_frame(axes: int, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(order of the axes, axes that run backwards) of one of the zigzags."""
    permutations = list(itertools.permutations(range(axes)))
    corner, which = divmod(number, len(permutations))
    # The first axis has the highest bit.
    flipped = tuple(axis for axis in range(axes) if corner >> (axes - 1 - axis) & 1)
    return permutations[which], flipped


def _zigzag(grid: np.ndarray, number: int) -> np.ndarray:
    order, flipped = _zigzag_frame(grid.ndim, number)
    path = np.flip(grid, flipped).transpose(order)
    shape = path.shape
    path = path.copy()
    for axis in reversed(range(grid.ndim - 1)):
        path = path.reshape(*shape[: axis + 1], -1)
        path[..., 1::2, :] = path[..., 1::2, ::-1].copy()
    return path.ravel()


def _zigzag_limit(axes: int, number: int) -> str | None:
    count = math.factorial(axes) * 2**axes
    return None if number < count else f"a grid of {axes} sides has zigzag:0 to zigzag:{count - 1}"


def _window(grid: np.ndarray, size: int) -> np.ndarray:
    places = np.indices(grid.shape).reshape(grid.ndim, -1)
    size = min(size, max(grid.shape))
    # lexsort's last key counts most.
    return grid.ravel()[np.lexsort((*(places % size)[::-1], *(places // size)[::-1]))]


def _multiscale(grid: np.ndarray, levels: int) -> np.ndarray:
    places = np.indices(grid.shape).reshape(grid.ndim, -1)
    # On a lattice wider than the grid there is the origin alone.
    levels = min(levels, max(grid.shape).bit_length())
    level = np.sum([(places % 2**s == 0).all(0) for s in range(1, levels + 1)], axis=0)
    return grid.ravel()[np.argsort(-level, kind="stable")]


def _axis_limit(axes: int, axis: int) -> str | None:
    return None if axis < axes else f"a grid of {axes} sides has axis:0 to axis:{axes - 1}"


_BASES = {
    "raster": _Base(lambda grid, _: grid.ravel(), line_axis=lambda axes, _: axes - 1),
    "column": _Base(lambda grid, _: grid.T.ravel(), line_axis=lambda axes, _: 0),
    "axis": _Base(_along, least=0, limit=_axis_limit, line_axis=lambda axes, axis: axis),
    "zigzag": _Base(
        _zigzag,
        least=0,
        default=0,
        limit=_zigzag_limit,
        line_axis=lambda axes, number: _zigzag_frame(axes, number)[0][-1],
    ),
    "snake": _Base(_zigzag, line_axis=lambda axes, _: axes - 1),
    "window": _Base(_window, least=1),
    "hilbert": _Base(lambda grid, _: grid[tuple(hilbert_path(grid.shape).T)]),
    "multiscale": _Base(_multiscale, least=1),
}
_SPELLINGS = {"axis": "axis:k", "zigzag": "zigzag:i", "window": "window:W", "multiscale": "multiscale:S"}
_MODIFIERS = ("reverse", "flip_h", "flip_w", "flip")


class _Order(NamedTuple):
    """A name, read for a grid of some number of axes."""

    base: _Base
    argument: int
    flips: tuple[int, ...]
    reverse: bool


def scan_order(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """int64 (T,), on the CPU: position k of the scan visits the token with number order[k] in raster order.

    Raises ValueError for an unknown name or argument, with those there are and the nearest one, and for a
    shape without 1 to 3 sides of at least 1 token.
    """
    return torch.from_numpy(_visits(name, tuple(shape)).copy())


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation, (T,) or one in each row (B, T), that undoes `order`: inverse[order[k]] = k."""
    places = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


def line_ends(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """int64 (L,), ascending: the positions of the scan at which a line (row, column, ...) has its last token.

    Raises ValueError as scan_order does, and for orders without lines.
    """
    shape = tuple(shape)
    _check_shape(name, shape)
    order = _parse(name, len(shape))
    if order.base.line_axis is None:
        raise ValueError(
            f"scan order {name!r} has no lines that end; with model.scan.line_ends use "
            + ", ".join(_spelling(base) for base, entry in _BASES.items() if entry.line_axis is not None)
        )
    length = shape[order.base.line_axis(len(shape), order.argument)]
    return torch.arange(length - 1, math.prod(shape), length, device="cpu")


@functools.lru_cache(maxsize=ORDERS_IN_CACHE)
def _visits(name: str, shape: tuple[int, ...]) -> np.ndarray:
    _check_shape(name, shape)
    order = _parse(name, len(shape))
    grid = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    visits = order.base.visit(np.flip(grid, order.flips), order.argument)
    return visits[::-1] if order.reverse else visits


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    if not 1 <= len(shape) <= MAX_AXES or min(shape) < 1:
        raise ValueError(
            f"scan order {name!r}: a grid has 1 to {MAX_AXES} sides of at least 1 token, not {shape}"
        )


def _spelling(base: str) -> str:
    return _SPELLINGS.get(base, base)


def _unknown(name: str, word: str, kind: str, known: tuple[str, ...]) -> ValueError:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}? " if near else ""
    orders = ", ".join(_spelling(base) for base in _BASES)
    return ValueError(
        f"scan order {name!r}: {kind} {word!r} is unknown; {meant}use one of {orders}, "
        "with +reverse, +flip_h, +flip_w or +flip:k behind it"
    )


def _number(name: str, part: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(
            f"scan order {name!r}: {part}:{text} needs a whole number of at least {least} after the colon, "
            f"such as {part}:{max(least, 2)}"
        )
    return int(text)


def _parse(name: str, axes: int) -> _Order:
    """Reads a name for grids of that many axes."""
    first, *modifiers = name.split("+")
    word, colon, text = first.partition(":")
    if word not in _BASES:
        raise _unknown(name, word, "order", tuple(_BASES))
    base = _BASES[word]
    if base.least is None:
        if colon:
            raise ValueError(f"scan order {name!r}: {word} takes no number; write {word!r}")
        argument = 0
    elif not colon and base.default is not None:
        argument = base.default
    else:
        argument = _number(name, word, text, base.least)
    if wrong := base.limit(axes, argument):
        raise ValueError(f"scan order {name!r}: {wrong}")
    flips = [_flipped_axis(name, modifier, axes) for modifier in modifiers if modifier != "reverse"]
    odd = tuple(axis for axis in range(axes) if flips.count(axis) % 2)
    return _Order(base, argument, odd, modifiers.count("reverse") % 2 == 1)


def _flipped_axis(name: str, modifier: str, axes: int) -> int:
    """The axis that a modifier mirrors."""
    word, colon, text = modifier.partition(":")
    if word not in _MODIFIERS or (colon and word != "flip"):
        raise _unknown(name, modifier, "modifier", _MODIFIERS)
    axis = _number(name, word, text, 0) if word == "flip" else axes - {"flip_w": 1, "flip_h": 2}[word]
    if not 0 <= axis < axes:
        raise ValueError(f"scan order {name!r}: a grid of {axes} sides has no axis for +{modifier}")
    return axis
