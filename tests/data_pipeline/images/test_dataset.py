"""The order of images: each sample once per epoch, the same whatever the ranks, resumed exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline import BatchLoader, ImageDataset, ImageNeeds, ImageValidation
from triptych.data_pipeline.images.dataset import open_training, open_validation

from .samples import CLASSES, config, image, npy, number_of, png, write_shards

PACKING = {"max_tokens": 24, "max_images": 4, "patch_size": 2, "max_image_tokens": 12}
BUCKETS = {"sizes": [[4, 4], [4, 8], [8, 4]]}


def sized(n: int) -> tuple[int, int]:
    """Sizes of all kinds of aspect ratio, between 2 and 17."""
    return 2 + n * 7 % 16, 2 + n * 5 % 13


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """23 images in 5 shards, and 9 in 3, of sizes of their own; the shade of an image is its number."""
    root = tmp_path_factory.mktemp("shards")
    first = write_shards(root / "a", [image(n, sized(n)) for n in range(23)])
    second = write_shards(root / "b", [image(n, sized(n)) for n in range(100, 109)], per_shard=3, first=100)
    return [{"path": first, "name": "a"}, {"path": second, "name": "b", "weight": 0.5}]


KINDS: dict[str, dict[str, Any]] = {
    "grid": {},
    "buckets": {"buckets": BUCKETS},
    "packing": {"packing": PACKING},
}
BATCH = 12


def opened(kind: str, sources: list[Any], **options: Any) -> ImageDataset:
    return ImageDataset(config(*sources, **KINDS[kind], **options), 3, CLASSES, global_batch_size=BATCH)


def numbers(row: dict[str, Any]) -> list[int]:
    """The images in a row by their shade, checked against their labels."""
    if "document_ids" not in row:
        if not row["valid"]:
            assert not row["x"].any() and row["labels"] == 0
            return []
        (n,) = number_of(row["x"][None])
        assert row["labels"] == n % 10
        return [int(n)]
    found = []
    for place in np.flatnonzero(row["valid"]):
        tokens = row["x"][row["document_ids"] == place]
        (n,) = number_of(tokens[None])
        assert row["labels"][place] == n % 10
        found.append(int(n))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_once_per_epoch_of_its_source(kind: str, sources: list[Any]) -> None:
    data = opened(kind, sources[:1])
    per_epoch = data.sources[0].samples_per_epoch
    assert data.num_images == 23 and (per_epoch == 23) == (kind == "grid")
    epochs = [
        [n for i in range(per_epoch) for n in numbers(data.sample(epoch * per_epoch + i))]
        for epoch in range(3)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_are_mixed_by_weight_each_with_its_own_epochs(kind: str, sources: list[Any]) -> None:
    data = opened(kind, sources)
    total = BATCH * 60
    rows = [data.sample(i) for i in range(total)]
    seen = Counter(n for row in rows for n in numbers(row))
    consumed = data.consumed(total)
    assert consumed == {"a": 480, "b": 240}, "weights 1 and 0.5, in rows"
    for source, members in zip(data.sources, (range(23), range(100, 109))):
        epochs = consumed[source.label] / source.samples_per_epoch
        assert {seen[n] for n in members} <= {int(epochs), int(epochs) + 1}
    for split in (1, 7, BATCH + 1, 100):
        counts = Counter("a" if n < 100 else "b" for i in range(split) for n in numbers(rows[i]))
        if kind == "grid":
            assert dict(counts) == {label: n for label, n in data.consumed(split).items() if n}
        assert sum(data.consumed(split).values()) == split


def test_samples_are_pure_functions_of_their_number(sources: list[Any]) -> None:
    """Opened again, in any order of asking; another seed gives another order."""
    for kind in KINDS:
        data, again = opened(kind, sources), opened(kind, sources)
        for i in (77, 3, 500, 3, 0):
            one, two = data.sample(i), again.sample(i)
            assert one.keys() == two.keys()
            assert all(np.array_equal(one[name], two[name]) for name in one)
        other = ImageDataset(config(*sources, **KINDS[kind]), 4, CLASSES, global_batch_size=BATCH)
        assert [numbers(other.sample(i)) for i in range(30)] != [numbers(data.sample(i)) for i in range(30)]
        assert other.sample(0)["sample_keys"] != data.sample(0)["sample_keys"]


def joined(batches: list[list[dict[str, torch.Tensor]]], key: str) -> torch.Tensor:
    """The rows of a step's ranks, in order of rank."""
    return torch.cat([micro_batch[key] for rank in batches for micro_batch in rank])


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(list(KINDS)),
    ranks=st.sampled_from([1, 2, 3, 4, 6, 12]),
    after=st.sampled_from([1, 2, 4, 12]),
    steps=st.integers(0, 6),
    read_ahead=st.integers(0, 2),
    threads=st.sampled_from([1, 3]),
)
def test_ranks_take_the_global_order_and_resume_on_any_number(
    sources: list[Any], kind: str, ranks: int, after: int, steps: int, read_ahead: int, threads: int
) -> None:
    """Also with several decoding threads, and more ranks than the second source has shards."""
    data = opened(kind, sources, decode_threads=threads)
    loaders = [BatchLoader(data, BATCH, 1, r, ranks, read_ahead=read_ahead) for r in range(ranks)]
    for _ in range(steps):
        for loader in loaders:
            next(loader)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(state == states[0] for state in states) and states[0]["total"] == steps * BATCH
    resumed = [
        BatchLoader(opened(kind, sources), BATCH, BATCH // after, r, after, read_ahead=read_ahead)
        for r in range(after)
    ]
    for loader in resumed:
        loader.load_state_dict(states[0])
    for step in range(steps, steps + 2):
        batches = [next(loader) for loader in resumed]
        expected = data.collate([data.sample(step * BATCH + i) for i in range(BATCH)])
        assert {name for rank in batches for each in rank for name in each} == set(expected)
        for name, values in expected.items():
            assert torch.equal(joined(batches, name), values)
    for loader in loaders + resumed:
        loader.close()


def test_the_batch_of_a_grid(sources: list[Any]) -> None:
    data = opened("grid", sources)
    batch = data.collate([data.sample(i) for i in range(6)])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "x": ((6, 1, 4, 4), torch.float32),
        "labels": ((6,), torch.int64),
        "valid": ((6,), torch.bool),
        "sample_keys": ((6,), torch.int64),
    }
    assert batch["valid"].all() and len(set(batch["sample_keys"].tolist())) == 6


def test_labels_and_texts_are_given_where_asked_for(tmp_path: Path) -> None:
    texts = [np.arange(2.0 * (2 + n)).reshape(2 + n, 2).astype(np.float16) for n in range(3)]
    path = write_shards(
        tmp_path, [{"png": png(np.full((4, 4), n)), "text.npy": npy(text)} for n, text in enumerate(texts)]
    )
    data = ImageDataset(config(path), 0, ImageNeeds(text=(5, 2)))
    batch = data.collate([data.sample(i) for i in range(3)])
    assert set(batch) == {"x", "text", "valid", "sample_keys"} and batch["text"].dtype == torch.float32
    for n, text in zip(number_of(batch["x"]), batch["text"].numpy()):
        assert np.array_equal(text[: 2 + n], texts[n]) and not text[2 + n :].any()
    assert set(ImageDataset(config(path), 0).sample(0)) == {"x", "valid", "sample_keys"}


def test_a_batch_has_one_bucket_the_nearest(sources: list[Any]) -> None:
    data = opened("buckets", sources)
    shapes = set()
    for step in range(20):
        rows = [data.sample(step * BATCH + i) for i in range(BATCH)]
        (shape,) = {row["x"].shape for row in rows}
        shapes.add(shape)
        found = [n for row in rows for n in numbers(row)]
        assert found and len({n >= 100 for n in found}) == 1, "a batch has one source"
        for n in found:
            aspect = np.log(sized(n)[0] / sized(n)[1])
            distances = [abs(aspect - np.log(height / width)) for height, width in BUCKETS["sizes"]]
            assert distances[BUCKETS["sizes"].index(list(shape[1:]))] == pytest.approx(min(distances))
        valid = [row["valid"] for row in rows]
        assert valid == sorted(valid, reverse=True), "rows that fill up a batch are its last"
    assert shapes == {(1, 4, 4), (1, 4, 8), (1, 8, 4)}


def test_buckets_hold_for_one_global_batch(sources: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"give its size \(train.global_batch_size\)"):
        ImageDataset(config(*sources, buckets=BUCKETS), 0)
    data = opened("buckets", sources)
    with pytest.raises(ValueError, match=r"made for global batches of 12 .* and 24 are to be read"):
        BatchLoader(data, 24, 12)
    with pytest.raises(ValueError, match=r"from sample 6 on"):
        BatchLoader(data, 12, 12, consumed=6)
    state = BatchLoader(data, 12, 12, consumed=24).state_dict()
    smaller = ImageDataset(config(*sources, buckets=BUCKETS), 3, CLASSES, global_batch_size=6)
    with pytest.raises(ValueError, match=r"for global batches of 12, this one's for 6 .* must stay"):
        BatchLoader(smaller, 6, 6).load_state_dict(state)
    with pytest.raises(ValueError, match=r"this one's for None"):
        BatchLoader(opened("grid", sources), 12, 12).load_state_dict(state)


def test_a_packed_row(sources: list[Any]) -> None:
    data = opened("packing", sources[:1])
    for i in range(data.sources[0].samples_per_epoch):
        row = data.sample(i)
        ids, sizes = row["document_ids"], row["sizes"]
        assert row["x"].shape == (24, 4) and ids.shape == (24,) and row["positions"].shape == (24, 2)
        start = 0
        for place, (height, width) in enumerate(sizes[row["valid"]].tolist()):
            stop = start + height * width
            assert (ids[start:stop] == place).all() and 1 <= height * width <= 12
            expected = [(r, c) for r in range(height) for c in range(width)]
            assert row["positions"][start:stop].tolist() == [list(each) for each in expected]
            start = stop
        assert (ids[start:] == 4).all() and not row["x"][start:].any() and not row["positions"][start:].any()
        assert not sizes[~row["valid"]].any() and not row["image_keys"][~row["valid"]].any()
        keys = row["image_keys"][row["valid"]].tolist()
        assert len({*keys, row["sample_keys"]}) == len(keys) + 1
    assert sum(len(numbers(data.sample(i))) for i in range(data.sources[0].samples_per_epoch)) == 23


def test_packed_images_are_cut_to_whole_patches(tmp_path: Path) -> None:
    """An image that fits keeps its pixels, but for the border beyond the last whole patch."""
    values = np.random.default_rng(0).integers(0, 256, (5, 8, 3))
    path = write_shards(tmp_path, [{"png": png(values)}])
    packing = {"max_tokens": 20, "max_images": 2, "patch_size": 2}
    row = ImageDataset(config(path, channels=3, packing=packing), 0).sample(0)
    assert row["sizes"].tolist() == [[2, 4], [0, 0]] and "labels" not in row
    expected = values[:4].transpose(2, 0, 1) / 127.5 - 1
    patch = expected[:, 2:4, 6:8].reshape(-1)
    assert np.allclose(row["x"][7], patch, atol=1e-6)


def test_flips_and_crops_are_keyed_by_the_sample(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (60, 60))
    path = write_shards(tmp_path, [{"png": png(values)}])
    for augment in ({"flip": True, "crop": "random_resized"}, {"flip": True}):
        data = ImageDataset(config(path, augment=augment), 0)
        rows = [data.sample(i)["x"] for i in range(40)]
        again = ImageDataset(config(path, augment=augment), 0)
        assert all(np.array_equal(again.sample(i)["x"], rows[i]) for i in reversed(range(40)))
        assert len({row.tobytes() for row in rows}) == (40 if "crop" in augment else 2)
    packing = {"max_tokens": 16, "max_images": 1, "patch_size": 1}
    data = ImageDataset(config(path, augment={"flip": True}, packing=packing), 0)
    assert len({data.sample(i)["x"].tobytes() for i in range(40)}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_one_pass_in_a_fixed_order(kind: str, sources: list[Any]) -> None:
    data = config(sources[0], valid=sources, augment={"flip": True, "crop": "center"}, **KINDS[kind])
    valid = open_validation(data, CLASSES, global_batch_size=BATCH)
    assert valid is not None
    found = [numbers(valid.sample(i)) for i in range(len(valid))]
    everything = [*range(23), *range(100, 109)]
    assert sorted(n for row in found for n in row) == everything
    if kind == "grid":
        assert [n for row in found for n in row] == everything
    again = ImageValidation(data, CLASSES, global_batch_size=BATCH)
    assert [numbers(again.sample(i)) for i in range(len(valid))] == found
    beyond = valid.sample(len(valid) + 3)
    assert not np.any(beyond["valid"]) and beyond["x"].shape == valid.sample(0)["x"].shape
    for ranks in (1, 3):
        loaders = [BatchLoader(valid, BATCH, 2, r, ranks) for r in range(ranks)]
        steps = list(zip(*loaders, strict=True))
        assert len(steps) == -(-len(valid) // BATCH)
        assert sum(int(joined(list(step), "valid").sum()) for step in steps) == 32
    counts = valid.consumed(len(valid))
    assert sum(counts.values()) == len(valid) and list(counts) == ["a", "b"]
    for limit in (1, 5, BATCH, 1000):
        part = open_validation(data, CLASSES, global_batch_size=BATCH, limit=limit)
        assert part is not None
        unit = BATCH if kind == "buckets" else 1
        assert len(part) == min(-(-limit // unit) * unit, len(valid))
        rows = [numbers(part.sample(i)) for i in range(len(part))]
        assert all(row in found for row in rows)


def test_validation_is_not_augmented(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (4, 4))
    path = write_shards(tmp_path, [{"png": png(values)}] * 20)
    data = config(path, valid=[path], augment={"flip": True, "crop": "random_resized"})
    valid = ImageValidation(data)
    for i in range(20):
        assert np.allclose(valid.sample(i)["x"][0], values / 127.5 - 1, atol=1e-6)


def test_opened_from_the_section(sources: list[Any]) -> None:
    data = config(*sources)
    assert open_training(data, 5).seed == 5
    assert open_training(data.model_copy(update={"seed": 7}), 5).seed == 7
    assert open_validation(data) is None


def test_reading_headers_and_building_digits_need_no_torch() -> None:
    """The command line loads these for its checks; torch would cost it more than a second."""
    code = (
        "import sys; from triptych.data_pipeline import ImageDataConfig, ImageDataset, DigitsOptions, "
        "build_digits, build_image_folder, build_latents, StreamedImages; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
