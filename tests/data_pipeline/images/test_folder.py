"""`triptych data images`: a folder of classes becomes shards, its files unchanged."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from triptych.data_pipeline import ImageDataset, ImageFolderOptions, ImageNeeds, build_image_folder
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.shards import Shards, find_shards

from .samples import config, png

CLASSES = ("bird", "cat", "dog")


def fill(root: Path, per_class: int, first: int = 0) -> dict[bytes, int]:
    """Images of sizes and kinds of their own, no two alike; bytes -> label."""
    made = {}
    draw = np.random.default_rng(first)
    for label, name in enumerate(CLASSES):
        for n in range(first, first + per_class):
            kind, suffix = [("PNG", "png"), ("JPEG", "JPEG"), ("WEBP", "webp")][n % 3]
            data = png(draw.integers(0, 256, (4 + n % 3, 5, 3)), kind)
            path = root / name / ("deeper" if n % 2 else ".") / f"{n}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            made[data] = label
    return made


def build(source: Path, out: Path, **options: object) -> object:
    return build_image_folder(
        ImageFolderOptions.model_validate({"source": str(source), "out": str(out), **options})
    )


def contents(directory: Path) -> dict[bytes, int]:
    shards = Shards(find_shards(str(directory)))
    found = {}
    for n in range(len(shards)):
        members = shards.read(n)
        (image,) = (data for suffix, data in members.items() if suffix != "cls")
        found[image] = int(members["cls"])
    return found


def test_files_are_copied_and_split_by_content(tmp_path: Path) -> None:
    made = fill(tmp_path / "in", 30)
    (tmp_path / "in" / "cat" / "notes.txt").write_text("no image")
    report = build(tmp_path / "in", tmp_path / "out", samples_per_shard=20, valid_share=0.2)
    train, valid = contents(tmp_path / "out" / "train"), contents(tmp_path / "out" / "valid")
    assert train | valid == made and not train.keys() & valid.keys()
    assert 5 < len(valid) < 40 and report.manifest.splits == {"train": len(train), "valid": len(valid)}
    assert Description.read(tmp_path / "out" / "train").classes == CLASSES
    shards = find_shards(str(tmp_path / "out" / "train"))
    assert len(shards) == -(-len(train) // 20)
    labels = Shards(shards[:1]).labels
    assert len(labels) == 20 and len(set(labels.tolist())) == 3, "classes are mixed"
    assert build(tmp_path / "in", tmp_path / "out", samples_per_shard=20, valid_share=0.2).reused
    data = ImageDataset(config(str(tmp_path / "out" / "train"), channels=3), 0, ImageNeeds(num_classes=3))
    counts = Counter(data.sample(i)["labels"] for i in range(len(train)))
    assert counts == Counter(train.values())


def test_a_folder_that_is_split_already(tmp_path: Path) -> None:
    train, valid = fill(tmp_path / "in" / "train", 8), fill(tmp_path / "in" / "val", 2, first=8)
    build(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out" / "train") == train
    assert contents(tmp_path / "out" / "valid") == valid
    os.utime(tmp_path / "in" / "val" / "cat" / "8.webp", ns=(0, 0))
    assert not build(tmp_path / "in", tmp_path / "out").reused, "an input has changed"


def test_what_is_no_image_is_left_out_and_named(tmp_path: Path) -> None:
    made = fill(tmp_path / "in", 5)
    (tmp_path / "in" / "cat" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    report = build(tmp_path / "in", tmp_path / "out", valid_share=0.0)
    assert contents(tmp_path / "out" / "train") == made and report.manifest.splits == {"train": 15}
    assert report.manifest.bad == ["cat/torn.jpg: is no image that can be read"]
    assert "left out as bad: 1" in report.summary()
    with pytest.raises(
        ValueError, match=r"1 inputs cannot be used, more than max_bad_samples=0: cat/torn.jpg"
    ):
        build(tmp_path / "in", tmp_path / "strict", max_bad_samples=0)
    assert not (tmp_path / "strict").exists()


def test_folders_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no directory; give a folder with one subfolder per class"):
        build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images in subfolders"):
        build(tmp_path / "in", tmp_path / "out")
    fill(tmp_path / "two" / "val", 1)
    fill(tmp_path / "two" / "valid", 1)
    with pytest.raises(ValueError, match=r"has one split twice \(val, valid\)"):
        build(tmp_path / "two", tmp_path / "out")
