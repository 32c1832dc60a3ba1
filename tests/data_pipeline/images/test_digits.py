"""`triptych data digits`: all of scikit-learn's digits, split once, built or found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from triptych.data_pipeline import DigitsOptions, ImageDataset, build_digits
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.digits import split

from .samples import CLASSES, config


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "out"
    report = build_digits(DigitsOptions(out=str(out)))
    assert not report.reused and "wrote" in report.summary()
    assert "train  1438 samples in 4 shards" in report.summary()
    return out


def rows(path: Path, size: int = 8) -> list[tuple[np.ndarray, int]]:
    data = ImageDataset(config(str(path), image_size=size, augment={"crop": "none"}), 0, CLASSES)
    assert len(data.bad) == 0
    found = [data.sample(i) for i in range(data.num_images)]
    return [(row["x"][0], row["labels"]) for row in found]


def test_all_digits_are_there_once_and_as_they_were(built: Path) -> None:
    digits = load_digits()
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(digits.images, digits.target))
    both = rows(built / "train") + rows(built / "valid")
    # 16 shades in 255 steps of 15.94, rounded: exact again after rounding back.
    shades = [((x.astype(np.float64) + 1) * 8).round() for x, _ in both]
    assert sorted((x.tobytes(), label) for x, (_, label) in zip(shades, both)) == expected


def test_the_split_is_stratified(built: Path) -> None:
    counts = {
        name: np.bincount([label for _, label in rows(built / name)], minlength=10)
        for name in ("train", "valid")
    }
    share = counts["valid"] / (counts["train"] + counts["valid"])
    assert abs(share - 0.2).max() < 0.005 and counts["valid"].sum() == 359


def test_images_alike_fall_on_the_same_side() -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 2, (400, 2, 2)).astype(np.uint8)
    labels = draw.integers(0, 3, 400)
    parts = split(images, labels, 0.3)
    assert sorted([*parts["train"], *parts["valid"]]) == list(range(400))
    sides = [{(images[n].tobytes(), labels[n]) for n in parts[name]} for name in ("train", "valid")]
    assert not sides[0] & sides[1] and all(sides)


def test_every_shard_has_all_classes(built: Path) -> None:
    for shard in sorted((built / "train").glob("*.tar")):
        counts = np.bincount([label for _, label in rows(shard)], minlength=10)
        assert counts.sum() in (360, 358) and counts.min() > 15


def test_the_description(built: Path) -> None:
    found = Description.read(built / "train")
    assert found == Description("images", 1, (8, 8), 1438, 4, tuple("0123456789"))
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["splits"] == {"train": 1438, "valid": 359} and manifest["options"]["size"] == 8
    assert len(list(built.rglob("*.index.npz"))) == 5, "shards are indexed when they are written"
    # Two members to a sample, each a header and a block; and the end of each archive.
    sizes = [path.stat().st_size for path in built.rglob("*.tar")]
    assert sum(sizes) < 1797 * 2048 + 5 * 10240 + 10240


def test_found_again_or_built_anew(built: Path) -> None:
    options = DigitsOptions(out=str(built))
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert build_digits(options).reused
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    with pytest.raises(ValueError, match=r"made otherwise \(size: 8 -> 16\); name another .* overwrite=true"):
        build_digits(DigitsOptions(out=str(built), size=16))
    shard = built / "valid" / "digits-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    report = build_digits(options)
    assert not report.reused and shard.read_bytes() == whole, "the same bytes each time"
    assert "was altered" in report.summary()


def test_other_sizes_and_shards(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    options = DigitsOptions(out=str(tmp_path / "out"), size=12, shards=7, valid_share=0.5)
    report = build_digits(options, lambda *stage: stages.append(stage))
    assert stages[-1] == ("digits", 1797, 1797) and sum(report.manifest.splits.values()) == 1797
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == 7
    assert len(list((tmp_path / "out" / "valid").glob("*.tar"))) == 2
    images = rows(tmp_path / "out" / "valid", 12)
    assert len(images) == report.manifest.splits["valid"]
    # Enlarged, not padded: the mean shade of all is nearly kept.
    digits = load_digits().images / 8 - 1
    both = images + rows(tmp_path / "out" / "train", 12)
    assert np.mean([x.mean() for x, _ in both]) == pytest.approx(digits.mean(), abs=0.02)


def test_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeError, match="not installed; pip install scikit-learn"):
        build_digits(DigitsOptions(out=str(tmp_path / "out")))


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not lose")
    with pytest.raises(ValueError, match="not empty and holds no shards of ours"):
        build_digits(DigitsOptions(out=str(tmp_path), overwrite=True))
    with pytest.raises(ValueError, match="is a file; name a directory"):
        build_digits(DigitsOptions(out=str(tmp_path / "thesis.tex")))
    (tmp_path / "manifest.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"manifest.json cannot be used .* overwrite=true"):
        build_digits(DigitsOptions(out=str(tmp_path)))
    assert (tmp_path / "thesis.tex").read_text() == "do not lose"
