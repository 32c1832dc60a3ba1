"""Data of vision models: sources of unlike tasks in one batch, and what becomes of samples of no use."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triptych.data_pipeline import BatchLoader, ImageDataset, ImageNeeds, ImageValidation, TaskNeeds
from triptych.data_pipeline.images.dataset import open_training, open_validation
from triptych.data_pipeline.images.description import Description

from .samples import config, image, npy, number_of, png, write_shards

TASKS = {
    "digits": TaskNeeds("classify", 0, num_classes=10),
    "shapes": TaskNeeds("segment", 1, num_classes=4),
    "places": TaskNeeds("detect", 2, num_classes=3),
    "words": TaskNeeds("contrast", 3, text=(3, 2)),
}
ALL = ImageNeeds(channels=1, tasks=TASKS)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40))


def only(name: str) -> ImageNeeds:
    return ImageNeeds(tasks={name: TASKS[name]})


def boxes(*found: tuple[list[float], int]) -> bytes:
    return json.dumps([{"box": box, "label": label} for box, label in found]).encode()


def sample(task: str, n: int, size: tuple[int, int] = (4, 4)) -> dict[str, bytes]:
    """Sample n of a task: all pixels n, and a target that tells n."""
    target = {
        "digits": {"cls": str(n % 10).encode()},
        "shapes": {"mask.png": png(np.full(size, n % 4))},
        "places": {"boxes.json": boxes(([0, 0, 1 + n % 3, 2], n % 3))},
        "words": {"text.npy": npy(np.full((1 + n % 3, 2), n, np.float32))},
    }[task]
    return {"png": png(np.full(size, n)), **target}


COUNTS = {"digits": 40, "shapes": 13, "places": 7, "words": 3}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A source for each task, the last of three samples in one shard."""
    root = tmp_path_factory.mktemp("tasks")
    return [
        {
            "path": write_shards(root / name, [sample(name, n) for n in range(count)], per_shard=7),
            "name": name,
            "task": name,
            "weight": weight,
        }
        for (name, count), weight in zip(COUNTS.items(), (2, 1, 1, 0.5))
    ]


def test_a_batch_has_every_key_whatever_its_samples(sources: list[Any]) -> None:
    data = ImageDataset(config(*sources, max_boxes=5), 0, ALL)
    expected = {
        "x": ((9, 1, 4, 4), torch.float32),
        "tasks": ((9,), torch.int64),
        "labels": ((9,), torch.int64),
        "labels_other": ((9,), torch.int64),
        "share": ((9,), torch.float32),
        "masks": ((9, 4, 4), torch.int64),
        "boxes": ((9, 5, 4), torch.float32),
        "box_labels": ((9, 5), torch.int64),
        "text": ((9, 3, 2), torch.float32),
        "valid": ((9,), torch.bool),
        "sample_keys": ((9,), torch.int64),
    }
    for first in (0, 9, 18):
        batch = data.collate([data.sample(first + i) for i in range(9)])
        assert {name: (tuple(v.shape), v.dtype) for name, v in batch.items()} == expected
        assert batch["valid"].all() and (batch["share"] == 1).all()
    for name in COUNTS:
        one = ImageDataset(config(dict(sources[list(COUNTS).index(name)]), max_boxes=5), 0, only(name))
        kept = {"digits": {"labels", "labels_other", "share"}, "shapes": {"masks"}}
        kept |= {"places": {"boxes", "box_labels"}, "words": {"text"}}
        assert set(one.sample(0)) == {"x", "tasks", "valid", "sample_keys"} | kept[name]
        assert one.sample(0)["tasks"] == TASKS[name].number


def test_a_row_has_the_target_of_its_task_and_no_other(sources: list[Any]) -> None:
    data = ImageDataset(config(*sources, max_boxes=5), 0, ALL)
    seen: Counter[int] = Counter()
    for i in range(200):
        row = data.sample(i)
        (n,) = number_of(row["x"][None])
        seen[row["tasks"]] += 1
        assert row["labels"] == row["labels_other"] == (n % 10 if row["tasks"] == 0 else -1)
        assert (row["masks"] == (n % 4 if row["tasks"] == 1 else -1)).all()
        if row["tasks"] == 2:
            assert row["box_labels"].tolist() == [n % 3, -1, -1, -1, -1]
            assert row["boxes"].tolist() == [[0, 0, 1 + n % 3, 2]] + [[0] * 4] * 4
        else:
            assert (row["box_labels"] == -1).all() and not row["boxes"].any()
        text = np.zeros((3, 2)) if row["tasks"] != 3 else np.where(np.arange(3) <= n % 3, n, 0)[:, None]
        assert (row["text"] == text).all()
    assert [seen[task] for task in range(4)] == pytest.approx([89, 44, 44, 22], abs=2), "2 : 1 : 1 : 0.5"


def test_a_source_that_ends_early_goes_round(sources: list[Any]) -> None:
    data = ImageDataset(config(*sources), 0, ALL)
    found: dict[int, Counter[int]] = {task: Counter() for task in range(4)}
    for i in range(900):
        row = data.sample(i)
        found[row["tasks"]][int(number_of(row["x"][None])[0])] += 1
    for task, count in enumerate(COUNTS.values()):
        assert len(found[task]) == count
        assert max(found[task].values()) - min(found[task].values()) <= 1, "its epochs are whole"
    assert sum(found[3].values()) == 100 and data.consumed(900)["words"] == 100


@pytest.mark.parametrize(("ranks", "micro", "threads"), [(1, 12, 1), (2, 3, 3), (12, 1, 1), (3, 2, 2)])
def test_the_order_knows_no_ranks(sources: list[Any], ranks: int, micro: int, threads: int) -> None:
    """More ranks than the last source has shards, or samples; resumed on another number of them."""
    options: dict[str, Any] = {"augment": {"flip": True, "crop": "random_resized", "randaugment": {}}}
    expected = ImageDataset(config(*sources, **options), 5, ALL)

    def loaders(ranks: int, micro: int) -> list[BatchLoader]:
        data = open_training(config(*sources, decode_threads=threads, **options), 5, ALL)
        return [BatchLoader(data, 12, micro, rank, ranks) for rank in range(ranks)]

    opened = loaders(ranks, micro)
    check(opened, expected, range(3))
    state = opened[0].state_dict()
    resumed = loaders(2, 6)
    for loader in resumed:
        loader.load_state_dict(state)
    check(resumed, expected, range(3, 5))
    for loader in opened + resumed:
        loader.close()


def check(loaders: list[BatchLoader], expected: ImageDataset, steps: range) -> None:
    for step in steps:
        parts = [each for loader in loaders for each in next(loader)]
        whole = expected.collate([expected.sample(12 * step + i) for i in range(12)])
        for name, values in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), values), name


def test_sources_name_their_task(sources: list[Any], tmp_path: Path) -> None:
    nameless = {"path": sources[0]["path"], "name": "a"}
    with pytest.raises(
        ValueError, match=r"source a does not say which of model.tasks \(digits, shapes, places, words"
    ):
        ImageDataset(config(nameless), 0, ALL)
    with pytest.raises(ValueError, match=r"source a has task=numbers, and model.tasks has digits, shapes"):
        ImageDataset(config({**nameless, "task": "numbers"}), 0, ALL)
    with pytest.raises(ValueError, match="source a has task=numbers"):
        ImageNeeds(tasks={"digits": TASKS["digits"]}).check(config({**nameless, "task": "numbers"}))
    with pytest.raises(ValueError, match="source b does not say"):
        ALL.check(config(sources[0], valid=[{"path": "b"}]))
    with pytest.raises(ValueError, match="source digits has task=digits, and the model has no tasks"):
        ImageDataset(config(sources[0]), 0, ImageNeeds(num_classes=10))
    assert ImageDataset(config(nameless), 0, only("digits")).sample(0)["tasks"] == 0, "there is one task"


def test_what_goes_with_no_task() -> None:
    with pytest.raises(ValueError, match=r"vision models read pixels; use data.content: images"):
        only("digits").check(config("a", content="latents"))
    packing = {"max_tokens": 4, "patch_size": 1}
    with pytest.raises(ValueError, match=r"data.packing .* and model.tasks.shapes is of kind segment; use"):
        ALL.check(config({"path": "a", "task": "digits"}, packing=packing))
    other = {**TASKS, "more": TaskNeeds("contrast", 4, text=(3, 8))}
    with pytest.raises(ValueError, match=r"texts of \['\(3, 2\)', '\(3, 8\)'\] .* make their text_length"):
        ImageNeeds(tasks=other).check(config({"path": "a", "task": "digits"}))


# What is wrong with a sample: its task, what it has in place of what it should, and what is told.
FAULTS: dict[str, tuple[str, dict[str, bytes], str]] = {
    "image": ("shapes", {"png": png(NOISE)[:300]}, "OSError"),
    "torn mask": ("shapes", {"mask.png": png(NOISE)[:300]}, "OSError"),
    "no mask at all": ("shapes", {"mask.png": b"torn"}, "UnidentifiedImageError"),
    "size of mask": (
        "shapes",
        {"mask.png": png(np.zeros((40, 39)))},
        r"size \[40, 39\] and its image \[40, 40\]",
    ),
    "class of mask": ("shapes", {"mask.png": png(np.full((40, 40), 4))}, "class 4, outside 0 .. 3"),
    "colours": ("shapes", {"mask.png": png(np.zeros((40, 40, 3)))}, "mode RGB"),
    "image of boxes": ("places", {"png": png(NOISE)[:300]}, "OSError"),
    "torn boxes": ("places", {"boxes.json": b'[{"box": '}, "JSONDecodeError"),
    "deep boxes": ("places", {"boxes.json": b"[" * 100_000}, "RecursionError|JSONDecodeError"),
    "boxes that are none": (
        "places",
        {"boxes.json": b'[{"box": [1, 2, "x", 4], "label": 0}]'},
        "finite numbers",
    ),
    "class of a box": ("places", {"boxes.json": boxes(([0, 0, 4, 4], 3))}, "label 3, outside 0 .. 2"),
    "image of a label": ("digits", {"png": png(NOISE)[:300]}, "OSError"),
    "image of a text": ("words", {"png": png(NOISE)[:300]}, "OSError"),
    "endless text": (
        "words",
        {"text.npy": npy(np.full((2, 2), np.inf, np.float32))},
        "text.npy holds values",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sample_that_cannot_serve_keeps_its_place(fault: str, tmp_path: Path) -> None:
    task, members, told = FAULTS[fault]
    samples = [sample(task, n, (40, 40)) for n in range(6)]
    whole = write_shards(tmp_path / "whole", samples)
    samples[2] |= members
    torn = write_shards(tmp_path / "torn", samples)
    augment = {"crop": "random_resized", "flip": True, "randaugment": {}}
    data, expected = (
        ImageDataset(config({"path": path, "task": task}, image_size=8, augment=augment), 0, ALL)
        for path in (torn, whole)
    )
    lost = 0
    for i in range(12):
        row, other = data.sample(i), expected.sample(i)
        assert all(np.isfinite(value).all() for value in row.values())
        assert row.keys() == other.keys() and other["valid"]
        if row["valid"]:
            assert all(np.array_equal(row[name], other[name]) for name in row)
            continue
        lost += 1
        assert row["labels"] == row["labels_other"] == -1 and row["share"] == 1
        assert not row["x"].any() and not row["boxes"].any() and not row["text"].any()
        assert (row["masks"] == -1).all() and (row["box_labels"] == -1).all()
        assert row["tasks"] == other["tasks"] and row["sample_keys"] == other["sample_keys"]
    assert lost == 2, "once in each epoch"
    assert len(data.bad) == 1 and ":002: " in data.bad.names[0]

    assert re.search(told, data.bad.names[0]), data.bad.names[0]
    strict = ImageDataset(config({"path": torn, "task": task}, image_size=8, max_bad_samples=0), 0, ALL)
    with pytest.raises(ValueError, match=r"1 samples could not be used, more than data.max_bad_samples=0"):
        [strict.sample(i) for i in range(6)]


@pytest.mark.parametrize(
    ("task", "member", "told"),
    [("shapes", "mask.png", "has no mask.png"), ("places", "boxes.json", "has no boxes.json")],
)
def test_a_sample_without_its_target_stands_in_no_row(
    task: str, member: str, told: str, tmp_path: Path
) -> None:
    samples = [sample(task, n) for n in range(4)]
    del samples[1][member]
    data = ImageDataset(config(write_shards(tmp_path, samples)), 0, only(task))
    assert data.num_images == 3 and len(data.bad) == 1 and told in data.bad.names[0]
    assert all(data.sample(i)["valid"] for i in range(6))


def test_classes_out_of_range_are_refused_from_the_start(sources: list[Any], tmp_path: Path) -> None:
    few = ImageNeeds(tasks={"digits": TaskNeeds("classify", 0, num_classes=7)})
    with pytest.raises(
        ValueError,
        match=r"12 of 40 samples of source digits have labels outside 0 .. 6 \(model.tasks.digits.num",
    ):
        ImageDataset(config(sources[0]), 0, few)
    with pytest.raises(ValueError, match=r"texts that do not fit model.tasks.words: text_length=2"):
        ImageDataset(
            config(sources[3]), 0, ImageNeeds(tasks={"words": TaskNeeds("contrast", 0, text=(2, 2))})
        )
    path = write_shards(tmp_path, [sample("shapes", 0)])
    Description("images", 1, (4, 4), 1, 1, tuple("abcde")).write(tmp_path)
    with pytest.raises(
        ValueError, match=r"has 5 classes \(dataset.json\), and model.tasks.shapes.num_classes=4; set it to 5"
    ):
        ImageDataset(config(path), 0, only("shapes"))
    more = ImageNeeds(tasks={"shapes": TaskNeeds("segment", 0, num_classes=6)})
    assert ImageDataset(config(path), 0, more).sample(0)["valid"]


def test_boxes_beyond_the_image_are_clipped_or_left_out(tmp_path: Path) -> None:
    found = boxes(
        ([-5, -5, 2, 3], 0), ([3, 1, 90, 90], 1), ([5, 5, 9, 9], 2), ([1, 1, 1, 3], 0), ([-9, 0, 0, 4], 1)
    )
    none = boxes(([40, 40, 50, 50], 0))
    path = write_shards(
        tmp_path, [{"png": png(np.zeros((8, 4))), "boxes.json": each} for each in (found, none, b"[]")]
    )
    data = ImageDataset(config(path, valid=[path], image_size=[8, 4], max_boxes=4), 0, only("places"))
    valid = ImageValidation(data.config, only("places"))
    first = valid.sample(0)
    # The first keeps 2 x 3 of 7 x 8, just a tenth; the second 1 x 7 of 87 x 89, less than that.
    assert first["box_labels"].tolist() == [0, -1, -1, -1] and first["boxes"][0].tolist() == [0, 0, 2, 3]
    for i in (1, 2):
        row = valid.sample(i)
        assert row["valid"] and (row["box_labels"] == -1).all() and not row["boxes"].any()
    assert len(data.bad) == len(data.cut) == 0


def test_boxes_beyond_the_places_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = boxes(*[([n, 0, n + 1, 1], n % 3) for n in range(4)])
    path = write_shards(tmp_path, [{"png": png(np.zeros((4, 4))), "boxes.json": many}, sample("places", 1)])
    data = ImageDataset(config(path, max_boxes=3), 0, only("places"))
    rows = [data.sample(i) for i in range(4)]
    assert sorted((row["box_labels"] >= 0).sum() for row in rows) == [1, 1, 3, 3]
    full = next(row for row in rows if (row["box_labels"] >= 0).all())
    assert full["boxes"][:, 0].tolist() == [0, 1, 2] and full["box_labels"].tolist() == [0, 1, 2]
    assert len(data.cut) == 1 and "part-000.tar:000 has more boxes than data.max_boxes=3" in caplog.text
    assert len(caplog.records) == 1 and len(data.bad) == 0


def test_validation_takes_so_many_of_each_source(sources: list[Any]) -> None:
    data = config(sources[0], valid=sources, max_boxes=5)
    for limit in (1, 5, 8, 100):
        valid = open_validation(data, ALL, limit=limit)
        assert valid is not None
        counts = {name: min(limit, count) for name, count in COUNTS.items()}
        assert len(valid) == sum(counts.values()) and valid.consumed(len(valid)) == counts
        rows = [valid.sample(i) for i in range(len(valid))]
        tasks = [row["tasks"] for row in rows]
        assert tasks == sorted(tasks) and [tasks.count(n) for n in range(4)] == list(counts.values())
        seen = [int(number_of(row["x"][None])[0]) for row in rows]
        start = 0
        for name, count in counts.items():
            part = seen[start : start + count]
            assert part == [n * COUNTS[name] // count for n in range(count)], "evenly over the source"
            start += count
        beyond = valid.sample(len(valid) + 2)
        assert not beyond["valid"] and beyond["labels"] == -1 and beyond.keys() == rows[0].keys()
    loaders = [BatchLoader(open_validation(data, ALL, limit=5), 6, 2, rank, 3) for rank in range(3)]
    steps = list(zip(*loaders, strict=True))
    assert sum(int(part["valid"].sum()) for step in steps for rank in step for part in rank) == 18


def test_validation_of_other_models_is_limited_in_total(sources: list[Any]) -> None:
    plain = [{"path": source["path"]} for source in sources[:2]]
    valid = open_validation(config(*plain, valid=plain), ImageNeeds(), limit=10)
    assert valid is not None and len(valid) == 10


def test_buckets_have_masks_and_boxes_of_their_size(tmp_path: Path) -> None:
    size = [(4, 4), (4, 8), (8, 4)]
    paths = [
        {
            "path": write_shards(tmp_path / name, [sample(name, n, size[n % 3]) for n in range(12)]),
            "task": name,
        }
        for name in ("shapes", "places")
    ]
    buckets = {"sizes": [list(each) for each in size]}
    data = ImageDataset(config(*paths, buckets=buckets), 0, ALL, global_batch_size=4)
    shapes = set()
    for i in range(40):
        row = data.sample(i)
        assert row["masks"].shape == row["x"].shape[1:]
        if row["tasks"] == 1 and row["valid"]:
            assert (row["masks"] == number_of(row["x"][None])[0] % 4).all()
        shapes.add(row["masks"].shape)
    assert shapes == set(size)


def test_packed_rows_for_classification(tmp_path: Path) -> None:
    samples = [image(n, (2 + n % 5, 3 + n % 4)) for n in range(20)]
    samples[4] = {"png": png(NOISE)[:300], "cls": b"4"}
    paths = [
        {"path": write_shards(tmp_path / name, samples, first=first), "task": name}
        for first, name in ((0, "digits"), (100, "others"))
    ]
    needs = ImageNeeds(tasks={"digits": TASKS["digits"], "others": TaskNeeds("classify", 1, num_classes=10)})
    packing = {"max_tokens": 24, "max_images": 4, "patch_size": 2, "max_image_tokens": 12}
    data = ImageDataset(config(*paths, valid=paths, packing=packing), 0, needs)
    keys = {
        "x",
        "positions",
        "document_ids",
        "sizes",
        "labels",
        "valid",
        "image_keys",
        "sample_keys",
        "tasks",
    }
    tasks = set()
    for i in range(2 * sum(source.samples_per_epoch for source in data.sources)):
        row = data.sample(i)
        assert set(row) == keys and row["labels"].shape == (4,)
        tasks.add(row["tasks"])
        assert (row["labels"][~row["valid"]] == -1).all()
        for place in np.flatnonzero(row["valid"]):
            (n,) = number_of(row["x"][row["document_ids"] == place][None])
            assert row["labels"][place] == n % 10
    assert tasks == {0, 1} and len(data.bad) == 2
    valid = ImageValidation(data.config, needs, limit=2)
    assert [valid.sample(i)["tasks"] for i in range(len(valid))] == [0, 0, 1, 1]
    assert not valid.sample(9)["valid"].any() and set(valid.sample(9)) == keys


def test_streams_of_tasks_with_fewer_shards_than_ranks(sources: list[Any]) -> None:
    """Each rank then is in a pass of its own; none waits for another, and all tasks come to all."""
    torn = [dict(source) for source in sources]
    data = open_training(config(*torn, stream={"shuffle": 1}, max_boxes=5), 0, ALL)
    loaders = [BatchLoader(data, 18, 1, rank, 9) for rank in range(9)]
    for loader in loaders:
        tasks: Counter[int] = Counter()
        for _ in range(18):
            for batch in next(loader):
                assert batch["valid"].all()
                (n,) = number_of(batch["x"])
                task = int(batch["tasks"])
                tasks[task] += 1
                assert int(batch["labels"]) == (n % 10 if task == 0 else -1)
                assert bool((batch["masks"] == (n % 4 if task == 1 else -1)).all())
        assert [tasks[task] for task in range(4)] == pytest.approx([16, 8, 8, 4], abs=1)
        loader.close()


def test_a_stream_gives_the_place_of_a_bad_sample_to_the_next(tmp_path: Path) -> None:
    samples = [sample("shapes", n) for n in range(5)]
    samples[1] |= {"mask.png": png(np.full((4, 4), 9))}
    del samples[3]["mask.png"]
    path = write_shards(tmp_path, samples)
    data = open_training(config(path, stream={"shuffle": 1}), 0, only("shapes"))
    with BatchLoader(data, 3, 3) as loader:
        seen = [number_of(next(loader)[0]["x"]).tolist() for _ in range(3)]
    assert all(sorted(each) == [0, 2, 4] for each in seen)
    assert len(data.bad) == 2 and any("class 9" in name for name in data.bad.names)


@pytest.mark.parametrize("form", ["cls", "json"])
def test_shards_as_others_write_them(form: str, tmp_path: Path) -> None:
    """ImageNet's usual shards: jpg with cls, or with json that has a label among other things."""
    extra: list[dict[str, bytes]] = [
        {"cls": str(n).encode(), "json": b'{"filename": "x"}', "txt": b"a cat"}
        if form == "cls"
        else {"json": json.dumps({"label": n, "width": 4, "caption": "a cat"}).encode()}
        for n in range(6)
    ]
    samples = [{"jpg": png(np.full((16, 16, 3), 10 * n), "JPEG"), **each} for n, each in enumerate(extra)]
    data = ImageDataset(config(write_shards(tmp_path, samples), channels=3), 0, only("digits"))
    rows = [data.sample(i) for i in range(6)]
    assert sorted(row["labels"] for row in rows) == list(range(6)) and len(data.bad) == 0
    for row in rows:
        assert np.abs((row["x"] + 1) * 127.5 - 10 * row["labels"]).max() < 4
