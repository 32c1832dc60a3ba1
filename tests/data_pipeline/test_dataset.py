"""The global order: coverage, document borders, and independence of everything but its arguments."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline import IGNORE, IndexedWriter, PackedDataset, SequentialDataset, SourceConfig

from .conftest import WriteCorpus

# Lengths of documents. Each token of a corpus is its place in the file, so it tells where it came from.
LENGTHS = st.lists(st.integers(0, 15), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 16)


def numbered(directory: str, lengths: list[int], first: int = 0) -> SourceConfig:
    """A corpus of documents of these lengths that counts through its tokens from `first` on."""
    path = str(Path(directory) / f"numbered{first}")
    with IndexedWriter(path, "int32") as writer:
        writer.add_documents(np.arange(first, first + sum(lengths)), np.asarray(lengths))
    return SourceConfig(path=path)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, seq_len=st.integers(1, 16), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_an_epoch_holds_each_token_once(lengths: list[int], seq_len: int, seed: int, epoch: int) -> None:
    """Each token is input at most once; left over is the tail, at most a sample and never nothing."""
    with tempfile.TemporaryDirectory() as directory:
        dataset = PackedDataset([numbered(directory, lengths)], seq_len, seed)
        per_epoch = (sum(lengths) - 1) // seq_len
        assert dataset.sources[0].samples_per_epoch == per_epoch
        samples = [dataset.sample(epoch * per_epoch + k) for k in range(per_epoch)]
        inputs = np.concatenate([sample["tokens"] for sample in samples])
        assert len(set(inputs.tolist())) == len(inputs) == per_epoch * seq_len
        assert 1 <= sum(lengths) - len(inputs) <= seq_len


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, seq_len=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_targets_follow_within_documents(lengths: list[int], seq_len: int, seed: int) -> None:
    """By the numbering: t + 1 follows t, unless t ends its document; ids count the documents of a row."""
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    ends = set((np.cumsum(lengths) - 1).tolist())
    with tempfile.TemporaryDirectory() as directory:
        dataset = PackedDataset([numbered(directory, lengths)], seq_len, seed)
        for i in range(2 * dataset.sources[0].samples_per_epoch):
            sample = dataset.sample(i)
            tokens, targets = sample["tokens"], sample["targets"]
            assert targets.tolist() == [IGNORE if t in ends else t + 1 for t in tokens.tolist()]
            documents = document_of[tokens]
            changes = np.concatenate([[0], np.cumsum(documents[1:] != documents[:-1])])
            assert sample["document_ids"].tolist() == changes.tolist()


def test_samples_depend_on_nothing_but_their_number(tmp_path: Path) -> None:
    """Neither on the samples read before, nor on where the files lie, nor on what the source is called."""
    lengths = [5, 9, 1, 14, 7, 30, 2]
    ordered = PackedDataset([numbered(str(tmp_path), lengths)], 4, seed=3)
    (tmp_path / "elsewhere").mkdir()
    moved = numbered(str(tmp_path / "elsewhere"), lengths).model_copy(update={"name": "moved"})
    scattered = PackedDataset([moved], 4, seed=3)
    samples = [ordered.sample(i) for i in range(60)]
    for i in np.random.default_rng(0).permutation(60):
        again = scattered.sample(int(i))
        assert again["tokens"].tolist() == samples[i]["tokens"].tolist()
        assert again["sample_keys"] == samples[i]["sample_keys"]


def test_seeds_and_epochs_differ(tmp_path: Path) -> None:
    source = numbered(str(tmp_path), [10] * 40)
    dataset = PackedDataset([source], 8, seed=0)
    epoch = dataset.sources[0].samples_per_epoch

    def tokens(dataset: PackedDataset, first: int) -> list[int]:
        return [int(t) for i in range(epoch) for t in dataset.sample(first + i)["tokens"]]

    orders = [tokens(dataset, 0), tokens(dataset, epoch), tokens(PackedDataset([source], 8, seed=1), 0)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = np.mean(np.asarray(orders[one]) == np.asarray(orders[other]))
        assert same < 0.1, f"orders {one} and {other} agree in {same:.0%} of the places"


def test_sample_keys_are_distinct_over_epochs_and_seeds(tmp_path: Path) -> None:
    source = numbered(str(tmp_path), [10] * 4)
    keys = [PackedDataset([source], 8, seed).sample(i)["sample_keys"] for seed in (0, 1) for i in range(100)]
    assert len(set(keys)) == 200
    assert all(0 <= value < 2**63 for value in keys)


def test_sources_are_mixed_and_each_passed_through_once_per_epoch(tmp_path: Path) -> None:
    small, large = numbered(str(tmp_path), [17]), numbered(str(tmp_path), [41, 40], first=1000)
    sources = [small.model_copy(update={"weight": 3.0}), large]
    dataset = PackedDataset(sources, 8, seed=0)
    assert [source.samples_per_epoch for source in dataset.sources] == [2, 10]
    drawn = [dataset.sample(i)["tokens"].min() >= 1000 for i in range(40)]
    assert sum(drawn) == 10 and sum(drawn[:20]) == 5
    assert dataset.consumed(40) == {small.path: 30, large.path: 10}
    alone = Counter(tuple(PackedDataset([large], 8, seed=0).sample(i)["tokens"].tolist()) for i in range(10))
    assert len(alone) == 10
    mixed = [tuple(dataset.sample(i)["tokens"].tolist()) for i in range(40) if drawn[i]]
    assert len(set(mixed)) == 10


def test_a_source_shorter_than_a_sample_is_refused(tmp_path: Path) -> None:
    source = numbered(str(tmp_path), [3, 5])
    assert PackedDataset([source], 7, 0).sources[0].samples_per_epoch == 1
    with pytest.raises(
        ValueError, match=r"has 8 tokens, fewer than .*data.seq_len=8, plus 1.*; lower data.seq_len"
    ):
        PackedDataset([source], 8, 0)
    with pytest.raises(ValueError, match="fewer than one sample"):
        SequentialDataset([source], 8)


def test_a_token_outside_the_vocabulary_is_named_when_it_is_read(write_corpus: WriteCorpus) -> None:
    """As it is after a flipped bit in the .bin, which nothing else can show without reading all of it."""
    path = write_corpus([[1] * 50])
    PackedDataset([SourceConfig(path=path)], 49, 0, vocab_size=2).sample(0)
    content = bytearray(Path(path + ".bin").read_bytes())
    content[21] ^= 0x80
    Path(path + ".bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"corpus.bin holds token 32769, but model.vocab_size=2"):
        PackedDataset([SourceConfig(path=path)], 49, 0, vocab_size=2).sample(0)


def test_validation_is_one_pass_in_file_order(tmp_path: Path) -> None:
    sources = [numbered(str(tmp_path), [5, 6, 7]), numbered(str(tmp_path), [30], first=100)]
    dataset = SequentialDataset(sources, 4)
    assert len(dataset) == 4 + 7
    tokens = np.concatenate([dataset.sample(i)["tokens"] for i in range(len(dataset))])
    assert tokens.tolist() == [*range(16), *range(100, 128)]
    assert dataset.sample(1)["targets"].tolist() == [IGNORE, 6, 7, 8]
    assert dataset.consumed(6) == {sources[0].path: 4, sources[1].path: 2}


def test_validation_past_its_end_has_no_targets(tmp_path: Path) -> None:
    dataset = SequentialDataset([numbered(str(tmp_path), [30])], 4)
    for i in (len(dataset), len(dataset) + 100):
        assert dataset.sample(i)["targets"].tolist() == [IGNORE] * 4


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 100])
def test_a_limited_validation_is_spread_over_all(tmp_path: Path, limit: int) -> None:
    dataset = SequentialDataset([numbered(str(tmp_path), [32])], 4, limit=limit)
    assert len(dataset) == min(limit, 7)
    firsts = [int(dataset.sample(i)["tokens"][0]) for i in range(len(dataset))]
    assert firsts == [4 * (i * 7 // min(limit, 7)) for i in range(min(limit, 7))]
    assert dataset.sample(len(dataset))["targets"].tolist() == [IGNORE] * 4
