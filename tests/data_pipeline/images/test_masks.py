"""`triptych data masks`: masks beside images, grey or palette, kept byte by byte."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.data_pipeline import ImageNeeds, ImageValidation, MaskOptions, TaskNeeds, build_masks
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.shards import Shards, find_shards
from triptych.data_pipeline.images.writing import ImageReport

from .samples import config, png

RANDOM = np.random.default_rng(0)


def palette(ids: np.ndarray) -> bytes:
    image = Image.new("P", ids.shape[::-1])
    image.putdata(ids.ravel().tolist())
    image.putpalette(RANDOM.integers(0, 256, 768).tolist())
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def write(root: Path, name: str, count: int = 6) -> dict[bytes, tuple[bytes, np.ndarray]]:
    """Pairs in root/name and root/name-masks; image bytes -> mask bytes and ids."""
    made = {}
    for n in range(count):
        size = (5 + n % 2, 7)
        ids = RANDOM.integers(0, 4, size).astype(np.uint8)
        ids[0, n % 7] = 255
        suffix, kind = ("jpg", "JPEG") if n % 3 else ("png", "PNG")
        place = "deeper/" if n % 2 else ""
        data, mask = png(RANDOM.integers(0, 256, (*size, 3)), kind), palette(ids) if n % 2 else png(ids)
        for path, content in (
            (root / name / f"{place}{n}.{suffix}", data),
            (root / f"{name}-masks" / f"{place}{n}.png", mask),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        made[data] = (mask, ids)
    return made


def build(root: Path, out: str = "out", **options: Any) -> ImageReport:
    values = {"images": str(root / "in"), "masks": str(root / "in-masks"), "out": str(root / out), **options}
    return build_masks(MaskOptions.model_validate({"valid_share": 0.0, **values}))


def read(directory: Path) -> list[dict[str, bytes]]:
    shards = Shards(find_shards(str(directory)))
    return [shards.read(n) for n in range(len(shards))]


def test_pairs_are_copied_as_they_are(tmp_path: Path) -> None:
    made = write(tmp_path, "in")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    report = build(tmp_path)
    assert report.manifest.splits == {"train": 6} and report.manifest.bad_count == 0
    found = {
        members.get("png") or members["jpg"]: members["mask.png"]
        for members in read(tmp_path / "out" / "train")
    }
    assert found == {image: mask for image, (mask, _) in made.items()}
    assert Description.read(tmp_path / "out" / "train").classes == tuple("0123")
    assert build(tmp_path).reused
    needs = ImageNeeds(tasks={"land": TaskNeeds("segment", 0, num_classes=4)})
    path = str(tmp_path / "out" / "train")
    valid = ImageValidation(config(path, valid=[path], channels=3, image_size=[5, 7]), needs)
    expected = [np.where(ids == 255, -1, ids.astype(int)) for _, ids in made.values() if len(ids) == 5]
    rows = [valid.sample(i)["masks"] for i in range(6)]
    assert all(any(np.array_equal(ids, row) for row in rows) for ids in expected) and len(expected) == 3


def test_two_splits_and_shares(tmp_path: Path) -> None:
    train, valid = write(tmp_path, "in"), write(tmp_path, "val", 2)
    options = {"valid_images": str(tmp_path / "val"), "valid_masks": str(tmp_path / "val-masks")}
    assert build(tmp_path, **options).manifest.splits == {"train": 6, "valid": 2}
    assert {members["mask.png"] for members in read(tmp_path / "out" / "valid")} == {
        m for m, _ in valid.values()
    }
    assert {members["mask.png"] for members in read(tmp_path / "out" / "train")} == {
        m for m, _ in train.values()
    }
    shared = build(tmp_path, "share", valid_share=0.5).manifest.splits
    assert sum(shared.values()) == 6 and set(shared) == {"train", "valid"}
    with pytest.raises(ValueError, match="valid_images and valid_masks go together"):
        build(tmp_path, "else", valid_masks=str(tmp_path / "val-masks"))


def test_pairs_that_cannot_serve_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "in", 8)
    masks = tmp_path / "in-masks"
    (masks / "0.png").unlink()
    (masks / "2.png").write_bytes(png(np.zeros((5, 7, 3))))
    (masks / "4.png").write_bytes(png(np.zeros((7, 5))))
    (masks / "deeper" / "1.png").write_bytes(b"torn")
    (tmp_path / "in" / "deeper" / "3.png").write_bytes(b"torn")
    report = build(tmp_path)
    assert report.manifest.splits == {"train": 3}
    told = sorted(report.manifest.bad)
    assert [each.split(":")[0] for each in told] == [
        "0.png",
        "2.jpg",
        "4.jpg",
        "deeper/1.jpg",
        "deeper/3.png",
    ]
    for each, words in zip(
        told, ("has no mask", "mode RGB", r"[5, 7], and its mask [7, 5]", "cannot be read", "is no image")
    ):
        assert words in each
    with pytest.raises(ValueError, match="5 inputs cannot be used, more than max_bad_samples=4"):
        build(tmp_path, "strict", max_bad_samples=4)


def test_directories_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images=.*in is no directory"):
        build(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"masks=.*in-masks is no directory"):
        build(tmp_path)
    (tmp_path / "in-masks").mkdir()
    with pytest.raises(ValueError, match=r"images=.* holds no images"):
        build(tmp_path)
    assert not (tmp_path / "out").exists()
