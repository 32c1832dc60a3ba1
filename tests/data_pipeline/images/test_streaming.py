"""Streams: what is promised for them, and no more."""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triptych.data_pipeline import BatchLoader, StreamedImages
from triptych.data_pipeline.images.dataset import open_training

from .samples import CLASSES, config, image, npy, number_of, write_shards, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """30 images in 6 shards of 5."""
    return Path(write_shards(tmp_path / "shards", [image(n) for n in range(30)]))


def opened(*sources: Any, seed: int = 1, **options: Any) -> StreamedImages:
    data = open_training(config(*sources, **{"stream": True, **options}), seed, CLASSES)
    assert isinstance(data, StreamedImages)
    return data


def take(loader: BatchLoader, steps: int) -> list[int]:
    """The images of some steps by their shade."""
    batches = [batch for _ in range(steps) for batch in next(loader)]
    assert all(bool(batch["valid"].all()) for batch in batches)
    x, labels = torch.cat([b["x"] for b in batches]), torch.cat([b["labels"] for b in batches])
    found = number_of(x)
    assert (found % 10 == labels.numpy()).all()
    return found.tolist()


@pytest.mark.parametrize("form", ["{path}", "file:{path}", "pipe:cat {path}"])
def test_one_rank_sees_each_sample_once_per_pass(shards: Path, form: str) -> None:
    url = form.format(path=f"{shards}/part-{{000..005}}.tar")
    with BatchLoader(opened(url, stream={"shuffle": 1}), 5, 5) as loader:
        passes = [take(loader, 6) for _ in range(3)]
    for seen in passes:
        assert sorted(seen) == list(range(30))
        # Unshuffled within: five at a time come from one shard, in its order.
        assert all(np.diff(seen[i : i + 5]).tolist() == [1] * 4 for i in range(0, 30, 5))
    assert passes[0] != passes[1]


def test_the_buffer_shuffles_and_loses_nothing(shards: Path) -> None:
    url = f"{shards}/part-{{000..005}}.tar"
    with BatchLoader(opened(url, stream={"shuffle": 10}), 5, 5, read_ahead=0) as loader:
        seen = take(loader, 60)
    counts = Counter(seen)
    # Ten passes were read for sure, and of them no more is missing than the buffer holds.
    assert max(counts.values()) <= 11 and sum(max(0, 10 - counts[n]) for n in range(30)) <= 10
    assert any(b - a != 1 for a, b in pairwise(seen) if a // 5 == b // 5)
    with BatchLoader(opened(url, stream={"shuffle": 10}), 5, 5, read_ahead=2) as loader:
        assert take(loader, 60) == seen, "the same run again gives the same order"
    with BatchLoader(opened(url, stream={"shuffle": 10}, seed=2), 5, 5) as loader:
        assert take(loader, 60) != seen


def test_ranks_read_shards_of_their_own(shards: Path) -> None:
    data = opened(f"{shards}/part-{{000..005}}.tar", stream={"shuffle": 1})
    loaders = [BatchLoader(data, 6, 1, r, 3) for r in range(3)]
    # Two shards of five samples each in a pass: five steps of two.
    seen = [take(loader, 5) for loader in loaders]
    assert sorted(n for each in seen for n in each) == list(range(30))
    assert len({n // 5 for each in seen for n in each}) == 6
    for loader in loaders:
        loader.close()


def test_fewer_shards_than_ranks(shards: Path) -> None:
    """Ranks are then in different passes; over many, each sample is read about equally often."""
    data = opened(f"{shards}/part-{{000..001}}.tar", stream={"shuffle": 1})
    loaders = [BatchLoader(data, 5, 1, r, 5) for r in range(5)]
    counts = Counter(n for loader in loaders for n in take(loader, 40))
    assert counts == Counter(dict.fromkeys(range(10), 20))
    for loader in loaders:
        loader.close()


def test_resumed_at_the_shard_it_had_reached(shards: Path) -> None:
    url = f"{shards}/part-{{000..005}}.tar"
    options = {"stream": {"shuffle": 1, "samples_per_shard": 5}}
    with BatchLoader(opened(url, **options), 4, 4) as loader:
        seen = take(loader, 3)  # 12 samples: two shards and two of the third
        state = loader.state_dict()
        seen += take(loader, 7)
    with BatchLoader(opened(url, **options), 4, 4) as resumed:
        resumed.load_state_dict(state)
        assert take(resumed, 5) == seen[10:30], "the third shard is read again from its start"
    # On two ranks the shards from there on are dealt to both.
    data = opened(url, **options)
    ranks = [BatchLoader(data, 4, 1, r, 2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    first, second = (take(rank, 5) for rank in ranks)
    order = [seen[i] // 5 for i in range(10, 30, 5)]
    assert [n // 5 for n in first] == [order[0]] * 5 + [order[2]] * 5
    assert [n // 5 for n in second] == [order[1]] * 5 + [order[3]] * 5
    for rank in ranks:
        rank.close()


def test_resumed_without_knowing_the_shards(shards: Path) -> None:
    """Anew, in another order, the same each time it is resumed there."""
    url = f"{shards}/part-{{000..005}}.tar"
    with BatchLoader(opened(url, stream={"shuffle": 1}), 5, 5) as loader:
        start = take(loader, 6)
        state = loader.state_dict()
    again = []
    for _ in range(2):
        with BatchLoader(opened(url, stream={"shuffle": 1}), 5, 5) as resumed:
            resumed.load_state_dict(state)
            again.append(take(resumed, 6))
    assert again[0] == again[1] != start and sorted(again[0]) == list(range(30))
    with BatchLoader(opened(url, stream={"shuffle": 1}), 5, 5) as used:
        take(used, 2)
        used.load_state_dict(state)
        assert take(used, 6) == again[0], "a loader that was used before goes on there too"


def test_sources_are_mixed(tmp_path: Path, shards: Path) -> None:
    other = write_shards(tmp_path / "other", [image(n) for n in range(100, 104)], first=100)
    data = opened(
        {"path": str(shards), "name": "a"}, {"path": f"file:{other}/part-000.tar", "name": "b", "weight": 0.5}
    )
    with BatchLoader(data, 6, 6) as loader:
        seen = take(loader, 20)
        assert loader.state_dict() == {"total": 120, "consumed": {"a": 80, "b": 40}}
    assert sum(n >= 100 for n in seen) == 40


def test_faults_give_their_place_to_the_next(tmp_path: Path) -> None:
    samples = [image(n) for n in range(10)]
    samples[1] = {"cls": b"1"}
    samples[2] = {"png": image(2)["png"]}
    samples[3] = image(3) | {"cls": b"cat"}
    samples[6] = {"png": b"\x89PNG torn", "cls": b"6"}
    path = Path(write_shards(tmp_path, samples))
    data = (path / "part-001.tar").read_bytes()
    (path / "part-001.tar").write_bytes(data[: 3 * 2048 + 700])
    stream = opened(f"file:{path}/part-{{000..002}}.tar", stream={"shuffle": 1})
    with BatchLoader(stream, 2, 2, read_ahead=0) as loader:
        counts = Counter(take(loader, 20))
    # 8 lost its label to the tear, and the third shard is not there.
    assert set(counts) == {0, 4, 5, 7}
    told = " ".join(stream.bad.names)
    assert len(stream.bad) == 7
    for name in (
        "part-000.tar:001",
        "000.tar:002",
        "000.tar:003",
        "001.tar:006",
        "001.tar:008",
        "part-002.tar: ",
    ):
        assert name in told
    limited = opened(f"{path}/part-000.tar", max_bad_samples=1)
    with BatchLoader(limited, 2, 2) as loader, pytest.raises(ValueError, match=r"data.max_bad_samples=1"):
        take(loader, 2)


def test_no_sample_at_all_ends(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("README", b"")])
    for path in (f"{tmp_path}/a.tar", f"file:{tmp_path}/{{0..3}}.tar"):
        with (
            BatchLoader(opened(path), 2, 2) as loader,
            pytest.raises(ValueError, match="gave no sample in a pass over its shards"),
        ):
            next(loader)


def test_nothing_but_bad_samples_ends(tmp_path: Path) -> None:
    """Though they are fewer than may be left out, and met again in each pass."""
    path = write_shards(tmp_path, [{"png": b"torn", "cls": b"1"}] * 3)
    with BatchLoader(opened(path, max_bad_samples=20), 2, 2) as loader:
        told = r"21 samples in a row could not be used, more than data.max_bad_samples=20; the first of all"
        with pytest.raises(ValueError, match=told):
            next(loader)


def test_compressed_shards(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path, [image(n) for n in range(5)])) / "part-000.tar"
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with BatchLoader(opened(f"{tmp_path}/a.tar.gz", stream={"shuffle": 1}), 5, 5) as loader:
        assert take(loader, 1) == list(range(5))


def test_labels_out_of_range_are_a_mistake(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [image(1) | {"cls": b"12"}])
    with (
        BatchLoader(opened(path), 1, 1) as loader,
        pytest.raises(ValueError, match=r"has label 12, outside 0 .. 9 \(model.conditioning.num_classes\)"),
    ):
        next(loader)


def test_latents_want_their_factor(tmp_path: Path) -> None:
    samples = [{name: npy(np.full((2, 4, 4), 3.0)) for name in ("mean.npy", "std.npy")} for _ in range(3)]
    for sample in samples:
        sample["std.npy"] = npy(np.zeros((2, 4, 4)))
    url = f"file:{write_shards(tmp_path, samples)}/part-000.tar"
    options = {"content": "latents", "channels": 2, "stream": True}
    with pytest.raises(ValueError, match="nothing says how the latents"):
        open_training(config(url, **options), 0)
    data = open_training(config(url, vae={"scale_factor": 0.5}, **options), 0)
    with BatchLoader(data, 3, 3) as loader:
        (batch,) = next(loader)
    assert (batch["x"] == 1.5).all()
