"""Reports on sets whose figures are known: by an extractor of plain pixels, and by one of real digits."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from rich.console import Console
from sklearn.datasets import load_digits

from triptych.tools.evaluate_images import compare_samples, write_reference
from triptych.tools.image_metrics.classifier import Classifier, train_classifier
from triptych.tools.image_metrics.features import Features
from triptych.tools.image_metrics.images import array_images


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Features are the pixels of images of 2 x 2; the likeliest class is the one the first pixel says."""

    identity: str = "pixels:1"
    name: str = "pixels"
    feature_size: int = 4
    knows_labels: bool = True
    reads_adm_statistics: bool = False

    def conditions(self) -> dict[str, Any]:
        return {"extractor": self.name}

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        if shape != (2, 2, 1):
            raise ValueError(f"{name} is not 2x2x1")

    def extract(self, images: np.ndarray) -> Features:
        features = torch.from_numpy(images.reshape(len(images), 4).astype(np.float32))
        return Features(features, torch.eye(4)[features[:, 0].long() % 4])


def pixels(count: int, seed: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, 2, 2, 1), dtype=np.uint8)


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """By scipy's root of a matrix."""
    a, b = a.reshape(len(a), -1).astype(float), b.reshape(len(b), -1).astype(float)
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    offset = a.mean(0) - b.mean(0)
    return float(offset @ offset + np.trace(one + other) - 2 * np.trace(scipy.linalg.sqrtm(one @ other)).real)


def test_figures_of_known_features() -> None:
    ours, theirs = pixels(60, 0, high=200), pixels(90, 1)
    labels = ours[:, 0, 0, 0].astype(np.int64) % 4
    labels[:15] = (labels[:15] + 1) % 4
    report = compare_samples(
        array_images(ours, labels, "drawn"), array_images(theirs, name="real"), Pixels(), batch_size=7
    )
    assert report.fid.value == pytest.approx(fid(ours, theirs), rel=1e-10)
    assert report.class_agreement.value == 0.75
    per_class = report.class_agreement.conditions["per_class"]
    assert set(per_class) == {"0", "1", "2", "3"}
    assert sum(share * (labels == int(label)).sum() for label, share in per_class.items()) == pytest.approx(
        45
    )
    assert report.inception_score.value is not None and 2 < report.inception_score.value <= 4
    assert report.inception_score.conditions == {"samples": 60, "splits": 10}
    assert report.precision.conditions == {"samples": 60, "reference": 90, "k": 3}


def test_a_set_against_itself() -> None:
    images = pixels(60, 2)
    report = compare_samples(array_images(images), array_images(images), Pixels())
    assert report.fid.value == pytest.approx(0.0, abs=1e-9)
    assert (report.precision.value, report.recall.value) == (1.0, 1.0)
    assert report.class_agreement.value is None
    assert report.class_agreement.conditions["why"] == "the samples carry no labels"
    made, real = report.conditions["samples"], report.conditions["reference"]
    assert made["pixels_sha256"] == real["pixels_sha256"]
    other = compare_samples(array_images(pixels(60, 3)), array_images(images), Pixels())
    assert other.conditions["samples"]["pixels_sha256"] != real["pixels_sha256"]


def test_thinning_keeps_mean_and_covariance_whole() -> None:
    ours, theirs = pixels(500, 4, high=128), pixels(400, 5)
    whole = compare_samples(array_images(ours), array_images(theirs), Pixels())
    thin = compare_samples(array_images(ours), array_images(theirs), Pixels(), neighbour_limit=50)
    assert thin.fid.value == whole.fid.value
    assert thin.inception_score.value == whole.inception_score.value
    assert thin.precision.conditions == {"samples": 50, "reference": 50, "k": 3}
    assert whole.recall.value is not None and whole.recall.value < 0.9
    assert thin.precision.value is not None and thin.recall.value is not None


def test_statistics_as_reference(tmp_path: Path) -> None:
    ours, theirs = pixels(60, 6), pixels(90, 7)
    path = tmp_path / "reference.npz"
    write_reference(path, array_images(theirs), Pixels())
    report = compare_samples(array_images(ours), path, Pixels())
    assert report.fid.value == pytest.approx(fid(ours, theirs), rel=1e-10)
    assert report.fid.conditions == {"samples": 60, "reference": 90, "features": 4}
    assert report.precision.value is None
    assert report.precision.conditions["why"] == "the reference is statistics without images"
    assert report.inception_score.value is not None
    with pytest.raises(ValueError, match=r"made with pixels:1, and this extractor is pixels:2"):
        compare_samples(array_images(ours), path, Pixels(identity="pixels:2"))


def test_adms_reference_files(tmp_path: Path) -> None:
    """Images and statistics of more images, by an extractor that the file does not name."""
    ours, theirs, all_of_them = pixels(60, 8), pixels(30, 9), pixels(300, 10)
    flat = all_of_them.reshape(300, 4).astype(float)
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=theirs, mu=flat.mean(0), sigma=np.cov(flat, rowvar=False))
    # By the extractor that ADM used: the statistics for FID, the images for the rest.
    by_adms = compare_samples(array_images(ours), path, Pixels(reads_adm_statistics=True))
    assert by_adms.fid.value == pytest.approx(fid(ours, all_of_them), rel=1e-10)
    assert by_adms.fid.conditions["reference"] == "a file that does not say"
    assert by_adms.precision.conditions["reference"] == 30
    # By any other: the images alone.
    by_another = compare_samples(array_images(ours), path, Pixels())
    assert by_another.fid.value == pytest.approx(fid(ours, theirs), rel=1e-10)
    np.savez(path, mu=flat.mean(0), sigma=np.cov(flat, rowvar=False))
    with pytest.raises(ValueError, match=r"name no extractor, so they are taken as TensorFlow's"):
        compare_samples(array_images(ours), path, Pixels())


def test_conditions_and_warnings_stand_beside_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    labels = np.array([0, 0, 0, 1])
    np.savez(path, pixels(4, 11), labels)
    report = compare_samples(path, array_images(pixels(90, 12), name="real"), Pixels())
    assert any("4 samples for 4 features" in warning for warning in report.warnings)
    assert any("no sampler settings" in warning for warning in report.warnings)
    settings = {"method": "heun", "steps": 50, "guidance": {"scale": 1.5}, "ema_decay": 0.999}
    path.with_suffix(".json").write_text(json.dumps(settings))
    report = compare_samples(path, array_images(pixels(90, 12), name="real"), Pixels())
    assert not any("no sampler settings" in warning for warning in report.warnings)
    assert report.conditions["sampling"] == settings
    made = report.conditions["samples"]
    assert (made["images"], made["classes"]) == (4, 2)
    assert (made["fewest_of_a_class"], made["most_of_a_class"]) == (1, 3)
    assert set(report.conditions["versions"]) >= {"triptych", "torch", "numpy"}
    assert report.conditions["date"].endswith("+00:00")

    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["fid"]["value"] == report.fid.value
    assert stored["inception_score"]["spread"] == report.inception_score.spread
    assert stored["conditions"] == report.conditions and stored["warnings"] == list(report.warnings)

    paper = io.StringIO()
    Console(width=300, file=paper).print(report.table())
    shown = paper.getvalue()
    for words in ("FID", "method heun", "guidance scale 1.5", "warning: 4 samples for 4 features", "k 3"):
        assert words in shown


def test_sets_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    ours = array_images(pixels(9, 13), name="drawn")
    with pytest.raises(ValueError, match="drawn has 1 channels and real 3"):
        compare_samples(ours, array_images(np.zeros((9, 2, 2, 3), np.uint8), name="real"), Pixels())
    with pytest.raises(ValueError, match="real is not 2x2x1"):
        compare_samples(ours, array_images(np.zeros((9, 3, 2, 1), np.uint8), name="real"), Pixels())
    with pytest.raises(ValueError, match=r"reference .*nowhere does not exist"):
        compare_samples(ours, tmp_path / "nowhere", Pixels())
    wrong = array_images(pixels(9, 14), np.full(9, 4))
    with pytest.raises(ValueError, match="label 4 is none of the extractor's classes 0 to 3"):
        compare_samples(wrong, ours, Pixels())
    one = compare_samples(array_images(pixels(1, 15)), array_images(pixels(90, 16)), Pixels())
    assert one.fid.value is None and "covariance" in one.fid.conditions["why"]
    assert one.precision.value is None and "k=3" in one.precision.conditions["why"]
    with pytest.raises(ValueError, match="one image; statistics need 2"):
        write_reference(tmp_path / "reference.npz", array_images(pixels(1, 17)), Pixels())


Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Digits:
    found = load_digits()
    return np.round(found.images * 255 / 16).astype(np.uint8)[..., None], found.target


@pytest.fixture(scope="module")
def classifier(digits: Digits) -> Classifier:
    return train_classifier(digits[0][:1200], digits[1][:1200], steps=300)


def test_real_digits_are_near_and_noise_is_far(
    digits: Digits, classifier: Classifier, tmp_path: Path
) -> None:
    images, labels = digits
    real = array_images(images[:1200], labels[:1200], "real digits")
    path = tmp_path / "held-out.npz"
    np.savez(path, images[1200:], labels[1200:])
    near = compare_samples(path, real, classifier)
    noise = np.random.default_rng(0).integers(0, 256, (597, 8, 8, 1), dtype=np.uint8)
    far = compare_samples(array_images(noise, labels[1200:]), real, classifier)
    assert near.fid.value is not None and far.fid.value is not None
    assert far.fid.value > 10 * near.fid.value
    assert near.class_agreement.value is not None and near.class_agreement.value > 0.9
    assert near.class_agreement.conditions["of_reference"] > 0.95
    assert far.class_agreement.value is not None and far.class_agreement.value < 0.3
    assert near.inception_score.value is not None and near.inception_score.value > 7
    assert near.precision.value is not None and near.precision.value > 0.6
    assert far.precision.value is not None and far.precision.value < near.precision.value
    assert near.conditions["extractor"]["weights_sha256"] == classifier.description.weights_sha256
    assert near.warnings == (
        "no sampler settings (a JSON file beside the samples): the numbers cannot be made again",
    )


def test_missing_classes_cost_recall(digits: Digits, classifier: Classifier) -> None:
    images, labels = digits
    real = array_images(images[:1200], labels[:1200])
    some = np.flatnonzero(labels[1200:] < 5) + 1200
    others = np.flatnonzero(labels[1200:] >= 0)[: len(some)] + 1200
    half = compare_samples(array_images(images[some], labels[some]), real, classifier)
    whole = compare_samples(array_images(images[others], labels[others]), real, classifier)
    assert half.recall.value is not None and whole.recall.value is not None
    # Half of the reference lies in classes that were drawn.
    assert half.recall.value < 0.55 < 0.6 < whole.recall.value
    assert half.inception_score.value is not None and half.inception_score.value < 5.5
    assert half.fid.value is not None and whole.fid.value is not None and half.fid.value > whole.fid.value


def test_a_poor_classifier_is_warned_of(digits: Digits) -> None:
    poor = train_classifier(digits[0][:100], digits[1][:100], steps=1)
    report = compare_samples(array_images(digits[0][:200]), array_images(digits[0][:300]), poor)
    assert any("held-out real images only" in warning for warning in report.warnings)
