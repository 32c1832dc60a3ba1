"""Permutations and mixing: pure functions, so their properties are tested as such."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline.order import Mixture, key, permutation


@settings(deadline=None)
@given(n=st.integers(0, 300), seed_key=st.integers(0, 2**64 - 1))
def test_a_permutation_holds_each_index_once(n: int, seed_key: int) -> None:
    assert sorted(permutation(n, seed_key).tolist()) == list(range(n))


def test_permutations_are_pinned() -> None:
    """A change here changes the order of everybody's data: no saved run would resume on the same samples."""
    assert key(0, "documents", 0, 0) == 4750876829482264152
    assert permutation(10, 4750876829482264152).tolist() == [5, 7, 8, 1, 0, 2, 4, 9, 6, 3]


def test_permutations_look_random() -> None:
    """Over many keys, each index is first about equally often; neighbouring keys are unrelated."""
    firsts = np.bincount([permutation(8, key(0, "documents", 0, epoch))[0] for epoch in range(4000)])
    assert (abs(firsts - 500) < 5 * 500**0.5).all(), f"index 0..7 came first {firsts} times in 4000"
    a, b = permutation(5000, 1), permutation(5000, 2)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.07
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.07


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(weights=WEIGHTS, start=st.integers(0, 10**12))
def test_each_source_is_read_in_order_without_gaps(weights: list[float], start: int) -> None:
    mixture = Mixture(weights, [str(s) for s in range(len(weights))])
    following = mixture.consumed(start)
    for i in range(start, start + 200):
        source, n = mixture.locate(i)
        assert n == following[source], f"sample {i} is number {n} of source {source}, not {following[source]}"
        following[source] += 1
    assert following == mixture.consumed(start + 200)
    assert sum(mixture.consumed(start)) == start


@settings(deadline=None, max_examples=50)
@given(weights=WEIGHTS, total=st.integers(0, 5 * Mixture.BLOCK))
def test_every_prefix_holds_the_shares(weights: list[float], total: int) -> None:
    """To within half the number of sources, plus what rounding the shares costs."""
    counts = Mixture(weights, [str(s) for s in range(len(weights))]).consumed(total)
    for weight, count in zip(weights, counts):
        expected = total * weight / sum(weights)
        assert abs(count - expected) <= len(weights) / 2 + 1 + total / Mixture.BLOCK


def test_equal_weights_alternate() -> None:
    mixture = Mixture([3.0, 3.0], ["a", "b"])
    assert [mixture.locate(i) for i in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert mixture.locate(10**15)[0] == 0


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight=1e-09 of source b is below 1/65536 .*raise it or remove"):
        Mixture([1.0, 1e-9], ["a", "b"])
