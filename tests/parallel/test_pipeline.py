"""Where a model is cut into stages."""

from __future__ import annotations

import doctest
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parallel.training import model_config
from triptych.parallel import local, pipeline
from triptych.parallel.pipeline import cut_stages, partition


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_partition_is_the_best_one(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))

    def measure(starts: tuple[int, ...]) -> tuple[int, int]:
        bounds = [0, *starts, len(costs)]
        sums = [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]
        return max(sums), sum(n * n for n in sums)

    starts = partition(costs, parts)
    assert starts == sorted(set(starts)) and len(starts) == parts - 1
    best = min(measure(choice) for choice in itertools.combinations(range(1, len(costs)), parts - 1))
    assert measure(tuple(starts)) == best


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_cover_the_blocks(stages: int) -> None:
    cut = cut_stages(model_config(), stages, seq_len=16)
    assert [block for stage in cut for block in stage] == list(range(4))
    assert len(cut) == stages and all(len(stage) for stage in cut)


def test_documented_examples_run() -> None:
    for module in (pipeline, local):
        assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=1)


def test_a_dear_head_takes_blocks_from_the_last_stage() -> None:
    cut = cut_stages(model_config(num_layers=8, vocab_size=4096), 2, seq_len=16)
    assert [len(stage) for stage in cut] == [7, 1]
