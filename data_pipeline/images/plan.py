"""The order of an epoch as a table of rows, whatever a row is: an image, a place in a bucket's batch, a pack.

    single   a row is an image
    buckets  G rows in a row have one size; a bucket's last G are filled up with rows of no image
    packed   a row is up to K images whose tokens fit

Every epoch of a plan has the same number of rows, so that row n of all epochs is found without those before
it, and each sample stands in it once. Packing is decided on the numbers of tokens alone: first fit in
decreasing size. Which of the images with that many tokens comes to a place is drawn anew each epoch.

N samples, R rows of an epoch, G rows of a global batch, K images in a row, -1 no image
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.order import permutation

IntArray = npt.NDArray[np.int64]
Keys = Callable[[str], int] | None
"""From a purpose to the key of an epoch's permutation; None: the order of the files."""


def _order(count: int, keys: Keys, purpose: str) -> IntArray:
    return np.arange(count) if keys is None else permutation(count, keys(purpose))


class Plan(ABC):
    """How the samples of a source become rows."""

    num_rows: int
    """R."""
    unit: int = 1
    """Rows that belong together: G with buckets."""

    @abstractmethod
    def epoch(self, keys: Keys) -> IntArray:
        """(R, K) samples, counted from 0, -1 where there is none."""


class SinglePlan(Plan):
    """One image to a row."""

    def __init__(self, count: int) -> None:
        self.num_rows = count

    def epoch(self, keys: Keys) -> IntArray:
        """(N, 1)"""
        return _order(self.num_rows, keys, "samples")[:, None]


class BucketPlan(Plan):
    """Global batches of one size each. Within an epoch the batches of all buckets are shuffled."""

    def __init__(self, buckets: IntArray, batch_size: int) -> None:
        """buckets: (N,) the bucket of each sample. batch_size: G."""
        self.buckets, self.unit = buckets, batch_size
        counts = np.bincount(buckets)
        self.num_rows = int((-(-counts // batch_size)).sum()) * batch_size

    def epoch(self, keys: Keys) -> IntArray:
        """(R, 1); rows b*G .. b*G + G - 1 are batch b, whose first row always is an image."""
        order = _order(len(self.buckets), keys, "samples")
        batches = []
        for bucket in np.unique(self.buckets):
            members = order[self.buckets[order] == bucket]
            batches.append(np.pad(members, (0, -len(members) % self.unit), constant_values=-1))
        table = np.concatenate(batches).reshape(-1, self.unit)
        return table[_order(len(table), keys, "batches")].reshape(-1, 1)


class PackedPlan(Plan):
    """Several images to a row, together at most max_tokens tokens."""

    def __init__(self, tokens: IntArray, max_tokens: int, max_images: int) -> None:
        """tokens: (N,) of each sample, each from 1 to max_tokens."""
        assert tokens.min() >= 1 and tokens.max() <= max_tokens, "an image does not fit a row"
        self.tokens = tokens
        # Places among the samples sorted by tokens; which of them stands there is the epoch's choice.
        self.table = pack(np.bincount(tokens), max_tokens, max_images)
        self.num_rows = len(self.table)

    def epoch(self, keys: Keys) -> IntArray:
        """(R, K), -1 behind the last image of a row."""
        order = _order(len(self.tokens), keys, "samples")
        by_tokens = order[np.argsort(self.tokens[order], kind="stable")]
        table = self.table[_order(self.num_rows, keys, "rows")]
        return np.where(table >= 0, by_tokens[table], -1)


def pack(counts: IntArray, max_tokens: int, max_images: int) -> IntArray:
    """First fit in decreasing size: (R, max_images) places in the sequence of items sorted by size, -1 for
    none.

    counts: (max_tokens + 1 or fewer,) how many items there are of each size.

    First fit puts an item into the first row where it fits, which, largest items first, is the same as
    filling one row after the other with the largest item that still fits. Rows filled alike follow each other
    until some size is used up, so they are made together: the work grows with the number of sizes, not of
    items.
    """
    left = counts.astype(np.int64).copy()
    # Items of one size are next to each other in the sorted sequence; the next unused one of each:
    following = np.cumsum(left) - left
    tables = [np.full((0, max_images), -1, np.int64)]
    while left.any():
        sizes = _largest_that_fit(left, max_tokens, max_images)
        used = np.bincount(sizes, minlength=len(left))
        times = int((left[used > 0] // used[used > 0]).min())
        table = np.full((times, max_images), -1, np.int64)
        for size in np.unique(sizes):
            columns = np.flatnonzero(np.asarray(sizes) == size)
            places = following[size] + np.arange(times * len(columns))
            table[:, columns] = places.reshape(times, len(columns))
        following += times * used
        left -= times * used
        tables.append(table)
    return np.concatenate(tables)


def _largest_that_fit(left: IntArray, max_tokens: int, max_images: int) -> list[int]:
    """Sizes of one row: again and again the largest that is left and fits."""
    remaining, room = left.copy(), max_tokens
    row: list[int] = []
    while len(row) < max_images:
        fitting = np.flatnonzero(remaining[: room + 1])
        if not len(fitting):
            break
        size = int(fitting[-1])
        row.append(size)
        remaining[size] -= 1
        room -= size
    return row


def nearest_bucket(sizes: npt.NDArray[np.int32], buckets: tuple[tuple[int, int], ...]) -> IntArray:
    """(N,) the bucket of each size (N, 2): nearest in log(height / width), then in log area, then the
    first."""
    logs = np.log(sizes.astype(np.float64))
    wanted = np.log(np.asarray(buckets, np.float64))
    aspect = np.abs((logs[:, :1] - logs[:, 1:]) - (wanted[:, 0] - wanted[:, 1])[None]).round(9)
    area = np.abs(logs.sum(axis=1)[:, None] - wanted.sum(axis=1)[None]).round(9)
    area_rank = np.argsort(np.argsort(area, axis=1, kind="stable"), axis=1)
    best = aspect == aspect.min(axis=1, keepdims=True)
    return np.where(best, area_rank, len(buckets)).argmin(axis=1)


def fit_tokens(sizes: npt.NDArray[np.int32], patch: int, max_tokens: int) -> IntArray:
    """(N, 2) height and width in tokens to which images (N, 2) are resized to have at most max_tokens.

    The aspect ratio is kept as far as whole patches let it; images that fit are only cut to whole patches.
    """
    tokens = sizes.astype(np.float64) / patch
    scale = np.minimum(1.0, np.sqrt(max_tokens / tokens.prod(axis=1)))[:, None]
    # The 1e-9 keeps 16.0 from being 15 by rounding.
    grid = np.maximum(1, np.floor(tokens * scale + 1e-9)).astype(np.int64)
    # One token high or wide leaves room for max_tokens the other way.
    return np.minimum(grid, max_tokens // grid[:, ::-1].clip(1, max_tokens))
