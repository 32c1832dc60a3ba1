"""A Hilbert curve through any box of 1, 2 or 3 sides: the generalised curve known as "gilbert" (J. Cerveny).

A box is walked from its corner p along its first side, `a`; b and c are its other sides. The box is cut into
parts that are walked in the same way, each beginning beside the end of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Vector = np.ndarray
"""int64 (3,): a place, or a side of a box with its length as its only entry that is not 0."""


def hilbert_path(shape: tuple[int, ...]) -> np.ndarray:
    """int64 (T, n): the coordinates of all T tokens of a grid of n <= 3 sides, in the curve's order.

    Begins at the origin. Steps are unit steps (one coordinate changes by 1) in 1-D, in 2-D whatever the sides
    are, and in 3-D where all are even or one is 1. In other boxes, where a side is odd, a few steps (fewer
    than 1 in 13) are diagonal: two coordinates change by 1.
    """
    assert len(shape) <= 3, f"no curve through a grid of {len(shape)} sides"
    sides = (*shape, *(1,) * (3 - len(shape)))
    # A path that ends at the other end of `a` after unit steps has the parity of a chessboard against it if
    # `a` is odd and another side even; so an even side goes first, the longest of them.
    first = min(range(3), key=lambda axis: (sides[axis] == 1, sides[axis] % 2, -sides[axis]))
    others = sorted((axis for axis in range(3) if axis != first), key=lambda axis: -sides[axis])
    box = np.diag(sides)
    steps = _walk(np.zeros(3, dtype=np.int64), box[first], box[others[0]], box[others[1]])
    return np.concatenate(list(steps))[:, : len(shape)]


def _walk(p: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[np.ndarray]:
    """Pieces (n, 3) of the path through the box at p with sides a, b, c: from p to p + a less one step."""
    w, h, d = (int(np.abs(side).sum()) for side in (a, b, c))
    if w * h * d == 0:
        return
    if (w > 1) + (h > 1) + (d > 1) <= 1:
        length, side = max((w, a), (h, b), (d, c), key=lambda item: item[0])
        yield p + np.arange(length)[:, None] * np.sign(side)
        return
    a2, b2, c2 = _half(a, w), _half(b, h), _half(c, d)
    da, db, dc = np.sign(a), np.sign(b), np.sign(c)
    if 2 * w > 3 * max(h, d):  # long: two boxes, one after the other
        yield from _walk(p, a2, b, c)
        yield from _walk(p + a2, a - a2, b, c)
    elif 3 * h > 4 * d:  # flat: three boxes, up, along and down
        yield from _walk(p, b2, c, a2)
        yield from _walk(p + b2, a, b - b2, c)
        yield from _walk(p + (a - da) + (b2 - db), -b2, c, a2 - a)
    elif 3 * d > 4 * h:  # flat the other way
        yield from _walk(p, c2, a2, b)
        yield from _walk(p + c2, a, b, c - c2)
        yield from _walk(p + (a - da) + (c2 - dc), -c2, a2 - a, b)
    else:  # about a cube: five boxes
        yield from _walk(p, b2, c2, a2)
        yield from _walk(p + b2, c, a2, b - b2)
        yield from _walk(p + (b2 - db) + (c - dc), a, -b2, c2 - c)
        yield from _walk(p + (a - da) + b2 + (c - dc), -c, a2 - a, b - b2)
        yield from _walk(p + (a - da) + (b2 - db), -b2, c2, a2 - a)


def _half(side: Vector, length: int) -> Vector:
    """About half of a side; an even length where there is a choice, so that the parts have unit steps."""
    half = length // 2
    return np.sign(side) * (half + (half % 2 if length > 2 else 0))
