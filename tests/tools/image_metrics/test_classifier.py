"""The small classifier: how well it reads digits, that it is reproducible, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from triptych.tools.image_metrics.classifier import (
    FEATURES,
    Classifier,
    data_identity,
    load_classifier,
    load_or_train,
    train_classifier,
)

Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def small(digits: Digits) -> Classifier:
    """Trained for a moment on two hundred digits."""
    return train_classifier(digits[0][:200], digits[1][:200], steps=20)


def test_reads_held_out_digits(digits: Digits) -> None:
    found = train_classifier(*digits)
    described = found.description
    assert described.accuracy >= 0.95
    assert (described.held_out, described.trained_on) == (359, 1438)
    assert described.classes == tuple("0123456789") and described.size == (8, 8)
    seen = found.extract(digits[0])
    right = (seen.probabilities.argmax(1).numpy() == digits[1]).mean()
    assert right >= 0.95


def test_held_out_images_are_not_trained_on() -> None:
    # Labels are noise: what is learnt by heart is known only where it was seen.
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    labels = generator.integers(0, 2, 200)
    found = train_classifier(images, labels, steps=300)
    right = (found.extract(images).probabilities.argmax(1).numpy() == labels).sum()
    share = (right - found.description.accuracy * found.description.held_out) / found.description.trained_on
    assert share > 0.9
    assert found.description.accuracy < 0.8


def test_same_arguments_give_the_same_weights(small: Classifier, digits: Digits) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again = train_classifier(digits[0][:200], digits[1][:200], steps=20)
        assert torch.get_num_threads() == 3 - min(threads, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.identity == small.identity
    assert again.description == small.description
    other = train_classifier(digits[0][:200], digits[1][:200], steps=20, seed=1)
    assert other.identity != small.identity


def test_features_and_probabilities(small: Classifier, digits: Digits) -> None:
    seen = small.extract(digits[0][:7])
    assert seen.features.shape == (7, FEATURES) and small.feature_size == FEATURES
    assert seen.probabilities.shape == (7, 10)
    torch.testing.assert_close(seen.probabilities.sum(1), torch.ones(7))
    # Each image is judged by itself.
    one = small.extract(digits[0][3:4])
    torch.testing.assert_close(one.features[0], seen.features[3])


def test_round_trip(small: Classifier, digits: Digits, tmp_path: Path) -> None:
    small.save(tmp_path / "a" / "b")
    found = load_classifier(tmp_path / "a" / "b")
    assert found.description == small.description
    assert found.identity == small.identity
    assert torch.equal(found.extract(digits[0]).features, small.extract(digits[0]).features)
    assert json.loads(json.dumps(found.conditions())) == found.conditions()
    assert found.conditions()["data_sha256"] == data_identity(digits[0][:200], digits[1][:200])


def test_what_was_stored_is_checked(small: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classifier\.json describes no classifier"):
        load_classifier(tmp_path)
    small.save(tmp_path)
    weights, description = tmp_path / "classifier.safetensors", tmp_path / "classifier.json"
    data, text = weights.read_bytes(), description.read_text()

    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"classifier\.safetensors cannot be read.*checksum"):
        load_classifier(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"classifier\.safetensors cannot be read"):
        load_classifier(tmp_path)
    weights.write_bytes(data)

    for key, value, complaint in (
        ("version", 2, "only version 1 is known"),
        ("channels", 3, r"classifier\.safetensors cannot be read"),
        ("classes", None, r"classifier\.json describes no classifier"),
    ):
        description.write_text(json.dumps(json.loads(text) | {key: value}))
        with pytest.raises(ValueError, match=complaint):
            load_classifier(tmp_path)
    description.write_text("[]")
    with pytest.raises(ValueError, match=r"classifier\.json describes no classifier"):
        load_classifier(tmp_path)


def test_is_trained_once_for_the_same_images(tmp_path: Path, digits: Digits) -> None:
    images, labels = digits[0][:60], digits[1][:60]
    first = load_or_train(tmp_path, images, labels, steps=9)
    stamp = (tmp_path / "classifier.safetensors").stat().st_mtime_ns
    assert load_or_train(tmp_path, images, labels, steps=9).identity == first.identity
    assert (tmp_path / "classifier.safetensors").stat().st_mtime_ns == stamp
    # Another length, other images, then a damaged file.
    assert load_or_train(tmp_path, images, labels, steps=8).description.steps == 8
    assert load_or_train(tmp_path, images[::-1], labels, steps=9).identity != first.identity
    (tmp_path / "classifier.safetensors").write_bytes(b"")
    said: list[str] = []
    assert load_or_train(tmp_path, images, labels, steps=9, progress=said.append).identity == first.identity
    assert "checksum" in said[0]
    assert load_classifier(tmp_path).identity == first.identity


@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 16, 1), (2, 30, 2), (32, 32, 3)])
def test_any_size_and_channels(shape: tuple[int, int, int]) -> None:
    # Two classes, dark and bright.
    labels = np.arange(20) % 2
    images = np.broadcast_to((labels * 200).astype(np.uint8)[:, None, None, None], (20, *shape))
    found = train_classifier(images, labels, classes=("dark", "bright"), steps=15)
    assert found.description.accuracy == 1.0
    assert (*found.description.size, found.description.channels) == shape


def test_other_images_than_those_trained_on_are_refused(small: Classifier) -> None:
    small.check("samples", (8, 8, 1))
    with pytest.raises(ValueError, match="samples has 3 channels; the classifier was trained on 1"):
        small.check("samples", (8, 8, 3))
    with pytest.raises(ValueError, match="16x16 pixels; the classifier was trained on 8x8"):
        small.check("samples", (16, 16, 1))


def test_what_cannot_be_trained_on_is_named(digits: Digits) -> None:
    images, labels = digits[0][:20], digits[1][:20]
    with pytest.raises(ValueError, match=r"class 0 has 1 image\(s\); 2 or more"):
        train_classifier(images[:3], np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="class 1 has 0"):
        train_classifier(images[:4], np.array([0, 2, 2, 0]))
    with pytest.raises(ValueError, match="labels from 0 to 9 do not fit 5 classes; they must be 0 to 4"):
        train_classifier(images, labels, classes=tuple("abcde"))
    with pytest.raises(ValueError, match="held_out_share=1"):
        train_classifier(images, labels, held_out_share=1.0)
    with pytest.raises(ValueError, match="holds no image"):
        train_classifier(images[:0], labels[:0])
