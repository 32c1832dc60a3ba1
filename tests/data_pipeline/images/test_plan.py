"""Rows of an epoch: nothing lost, nothing twice, nothing too long, whatever the samples are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline.images.plan import (
    BucketPlan,
    PackedPlan,
    Plan,
    SinglePlan,
    fit_tokens,
    nearest_bucket,
    pack,
)
from triptych.data_pipeline.order import key

SIZES = st.lists(st.integers(1, 24), min_size=1, max_size=120)


def keys(epoch: int) -> object:
    return lambda purpose: key(0, purpose, epoch)


def check_epochs(plan: Plan, count: int) -> list[np.ndarray]:
    """Two epochs and the order of the files: each has every sample once, in as many rows as the plan says."""
    tables = [plan.epoch(keys(0)), plan.epoch(keys(1)), plan.epoch(None)]
    for table in tables:
        assert len(table) == plan.num_rows
        assert sorted(table[table >= 0].tolist()) == list(range(count))
    assert np.array_equal(tables[0], plan.epoch(keys(0)))
    return tables


def test_single() -> None:
    first, second, files = check_epochs(SinglePlan(100), 100)
    assert files.ravel().tolist() == list(range(100))
    assert not np.array_equal(first, second) and not np.array_equal(first, files)


@settings(deadline=None)
@given(buckets=st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=80), batch=st.integers(1, 9))
def test_batches_of_one_bucket(buckets: list[int], batch: int) -> None:
    of = np.array(buckets)
    plan = BucketPlan(of, batch)
    for table in check_epochs(plan, len(buckets)):
        short = np.zeros(6, int)
        for rows in table.reshape(-1, batch):
            real = rows[rows >= 0]
            assert len(np.unique(of[real])) == 1 and rows[0] >= 0
            assert (rows[len(real) :] == -1).all()
            short[of[real[0]]] += len(real) < batch
        # No more is filled up than each bucket's last batch.
        assert (short <= 1).all()
    assert plan.num_rows == sum(-(-n // batch) * batch for n in np.bincount(of))


def test_batches_of_all_buckets_are_shuffled() -> None:
    of = np.repeat([0, 1], 400)
    table = BucketPlan(of, 4).epoch(keys(0))
    order = of[table.reshape(-1, 4)[:, 0]]
    changes = int((np.diff(order) != 0).sum())
    assert 70 < changes < 130, f"{changes} changes of size among 200 batches; half of them are expected"


@settings(deadline=None)
@given(tokens=SIZES, room=st.integers(24, 60), images=st.integers(1, 6))
def test_packs_lose_nothing_and_fit(tokens: list[int], room: int, images: int) -> None:
    of = np.array(tokens)
    plan = PackedPlan(of, room, images)
    tables = check_epochs(plan, len(tokens))
    for table in tables:
        sums = np.where(table >= 0, of[table], 0).sum(axis=1)
        assert table.shape[1] == images and sums.max() <= room
        assert (np.diff((table >= 0).astype(int), axis=1) <= 0).all(), "an image stands behind a gap"
    packed = np.sort(np.where(tables[0] >= 0, of[tables[0]], 0), axis=None)
    assert np.array_equal(packed, np.sort(np.where(tables[1] >= 0, of[tables[1]], 0), axis=None))


def first_fit_decreasing(tokens: list[int], room: int, images: int) -> list[list[int]]:
    """As textbooks have it: each item, largest first, goes into the first row that can take it."""
    rows: list[list[int]] = []
    for size in sorted(tokens, reverse=True):
        for row in rows:
            if sum(row) + size <= room and len(row) < images:
                row.append(size)
                break
        else:
            rows.append([size])
    return rows


@settings(deadline=None, max_examples=200)
@given(tokens=SIZES, room=st.integers(24, 60), images=st.integers(1, 6))
def test_packs_are_first_fit_decreasing(tokens: list[int], room: int, images: int) -> None:
    table = pack(np.bincount(tokens), room, images)
    ordered = np.sort(tokens)
    found = [[int(ordered[place]) for place in row if place >= 0] for row in table]
    assert sorted(found) == sorted(first_fit_decreasing(tokens, room, images))


def test_a_million_images_are_packed_at_once() -> None:
    tokens = np.random.default_rng(0).integers(100, 257, 1_000_000)
    table = PackedPlan(tokens, 1024, 16).table
    assert (table >= 0).sum() == 1_000_000
    assert tokens.sum() / (len(table) * 1024) > 0.97, "more than 3 % of the rows is padding"


def test_images_alike_in_tokens_change_places_between_epochs() -> None:
    """Which images share a row is drawn anew, not only in which order the rows come."""
    plan = PackedPlan(np.full(200, 8), 32, 4)
    neighbours = [
        {frozenset(row[row >= 0].tolist()) for row in plan.epoch(keys(epoch))} for epoch in range(2)
    ]
    assert len(neighbours[0] & neighbours[1]) < 5


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    buckets=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6),
)
def test_the_nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> None:
    def distance(bucket: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(np.log(size[0] / size[1]) - np.log(bucket[0] / bucket[1]))
        return round(aspect, 6), round(abs(np.log(size[0] * size[1]) - np.log(bucket[0] * bucket[1])), 6)

    (found,) = nearest_bucket(np.array([size], np.int32), tuple(buckets))
    best = min(distance(bucket) for bucket in buckets)
    assert distance(buckets[found]) == pytest.approx(best, abs=2e-6)


@settings(deadline=None, max_examples=300)
@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    patch=st.sampled_from([1, 2, 8, 16]),
    most=st.integers(1, 300),
)
def test_images_are_resized_to_fit(size: tuple[int, int], patch: int, most: int) -> None:
    ((height, width),) = fit_tokens(np.array([size], np.int32), patch, most).tolist()
    assert height >= 1 and width >= 1 and height * width <= most
    whole = (max(1, size[0] // patch), max(1, size[1] // patch))
    assert height <= max(whole[0], 1) and width <= max(whole[1], 1)
    if size[0] >= patch <= size[1] and whole[0] * whole[1] <= most and size[0] * size[1] <= most * patch**2:
        assert (height, width) == whole, "an image that fits is not resized"
    if min(height, width) > 4:
        # Rounding down to whole patches moves the aspect ratio by less than one patch each way.
        exact = size[0] / size[1]
        assert height / (width + 1) < exact < (height + 1) / width


def test_fit_as_in_the_paper() -> None:
    """FiT: 256 tokens of 16 pixels (8 of the autoencoder times 2)."""
    sizes = np.array([[256, 256], [512, 512], [160, 320], [1000, 250], [100, 4000]], np.int32)
    expected = [[16, 16], [16, 16], [10, 20], [32, 8], [2, 101]]
    assert fit_tokens(sizes, 16, 256).tolist() == expected
