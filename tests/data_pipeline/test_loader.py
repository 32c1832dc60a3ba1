"""Batches of ranks: the same samples whatever the number of ranks, and exact resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline import (
    IGNORE,
    BatchLoader,
    DataConfig,
    MicroBatch,
    PackedDataset,
    SequentialDataset,
    SourceConfig,
    open_training,
    open_validation,
)

from .test_dataset import numbered

KEYS = ("tokens", "targets", "document_ids", "sample_keys")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    directory = str(tmp_path_factory.mktemp("corpora"))
    sources = [numbered(directory, [9, 14, 3, 22, 8]), numbered(directory, [50, 31], first=1000)]
    return PackedDataset([sources[0], sources[1].model_copy(update={"weight": 2.0})], 5, seed=1)


def joined(batches: list[list[MicroBatch]], key: str) -> torch.Tensor:
    """The rows of a step's ranks, in order of rank."""
    return torch.cat([micro_batch[key] for rank in batches for micro_batch in rank])


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
    micro=st.sampled_from([1, 2, 3]),
    read_ahead=st.integers(0, 3),
    consumed=st.integers(0, 100),
)
def test_ranks_together_take_the_global_order(
    dataset: PackedDataset, ranks: int, micro: int, read_ahead: int, consumed: int
) -> None:
    if 12 % (ranks * micro):
        micro = 1
    loaders = [
        BatchLoader(dataset, 12, micro, r, ranks, consumed, read_ahead=read_ahead) for r in range(ranks)
    ]
    for step in range(3):
        batches = [next(loader) for loader in loaders]
        assert all(micro_batch["tokens"].shape == (micro, 5) for rank in batches for micro_batch in rank)
        expected = [dataset.sample(consumed + step * 12 + i) for i in range(12)]
        for key in KEYS:
            rows = joined(batches, key)
            assert rows.dtype == torch.int64
            assert rows.tolist() == [torch.as_tensor(row[key]).tolist() for row in expected]
    for loader in loaders:
        loader.close()


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(0, 6), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]))
def test_resumed_on_any_number_of_ranks(dataset: PackedDataset, steps: int, before: int, after: int) -> None:
    """Each rank saves the same state; loaded on other ranks, it goes on without gap or repetition."""
    loaders = [BatchLoader(dataset, 8, 2, r, before) for r in range(before)]
    for _ in range(steps):
        for loader in loaders:
            next(loader)
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    assert states[0]["total"] == 8 * steps == sum(states[0]["consumed"].values())
    resumed = [BatchLoader(dataset, 8, 1, r, after) for r in range(after)]
    for loader in resumed:
        next(loader)
        loader.load_state_dict(states[0])
    for step in range(steps, steps + 2):
        keys = joined([next(loader) for loader in resumed], "sample_keys")
        assert keys.tolist() == [dataset.sample(8 * step + i)["sample_keys"] for i in range(8)]
    for loader in loaders + resumed:
        loader.close()


def test_other_weights_do_not_resume(dataset: PackedDataset) -> None:
    loader = BatchLoader(dataset, 8, 8, consumed=48)
    state = loader.state_dict()
    paths = [source.tokens.path for source in dataset.sources]
    changed = PackedDataset([SourceConfig(path=path) for path in paths], 5, seed=1)
    with pytest.raises(ValueError, match=r"had consumed .* restore data.sources"):
        BatchLoader(changed, 8, 8).load_state_dict(state)


def test_moved_sources_resume_and_swapped_ones_do_not(tmp_path: Path) -> None:
    first, second = numbered(str(tmp_path), [50]), numbered(str(tmp_path), [70], first=1000)
    state = BatchLoader(PackedDataset([first, second], 5, seed=1), 8, 8, consumed=48).state_dict()
    state = json.loads(json.dumps(state))
    moved = first.model_copy(update={"name": "elsewhere"})
    loader = BatchLoader(PackedDataset([moved, second], 5, seed=1), 8, 8)
    loader.load_state_dict(state)
    assert loader.state_dict() == {"total": 48, "consumed": {"elsewhere": 24, second.path: 24}}
    for sources in ([second, first], [first], [moved, first]):
        with pytest.raises(ValueError, match=r"restore data.sources"):
            BatchLoader(PackedDataset(sources, 5, seed=1), 8, 8).load_state_dict(state)


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(8, 3, 1), (8, 2, 3), (8, 8, 2), (2, 1, 4)])
def test_batches_that_do_not_divide_are_refused(
    dataset: PackedDataset, batch: int, micro: int, ranks: int
) -> None:
    with pytest.raises(
        ValueError, match=rf"train.global_batch_size={batch} .*use a multiple of {micro * ranks}"
    ):
        BatchLoader(dataset, batch, micro, 0, ranks)


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_validation_ends_with_a_full_batch_of_the_rest(tmp_path: Path, read_ahead: int) -> None:
    """On each rank after as many batches; the targets are those of the pass, whatever the batch."""
    valid = SequentialDataset([numbered(str(tmp_path), [41])], 4)
    expected = [t for i in range(len(valid)) for t in valid.sample(i)["targets"].tolist() if t != IGNORE]
    for batch, ranks in ((4, 1), (4, 2), (16, 4), (10, 1)):
        loaders = [BatchLoader(valid, batch, 1, r, ranks, read_ahead=read_ahead) for r in range(ranks)]
        steps = list(zip(*loaders, strict=True))
        assert len(steps) == -(-10 // batch)
        targets = [
            t for step in steps for t in joined(list(step), "targets").flatten().tolist() if t != IGNORE
        ]
        assert targets == expected


def test_an_error_in_reading_reaches_the_caller_each_time(tmp_path: Path) -> None:
    """And the next batch is not handed out in place of the one that failed."""
    data = PackedDataset([numbered(str(tmp_path), [41])], 4, seed=0, vocab_size=2)
    with BatchLoader(data, 2, 2) as loader:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"but model.vocab_size=2"):
                next(loader)
        assert loader.state_dict()["total"] == 0


def test_opened_from_the_section(tmp_path: Path) -> None:
    path = numbered(str(tmp_path), [41]).path
    config = DataConfig.model_validate({"sources": [path], "valid": [path], "seq_len": 4})
    assert open_training(config, 5).seed == 5
    assert open_training(config.model_copy(update={"seed": 7}), 5).seed == 7
    valid = open_validation(config, limit=3)
    assert valid is not None and len(valid) == 3
    assert open_validation(config.model_copy(update={"valid": None})) is None
