"""A run's own images as a reference."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.images.digits import build_digits
from triptych.data_pipeline.images.options import DigitsOptions
from triptych.tools.image_metrics.data import data_images

Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "digits"
    build_digits(DigitsOptions(out=str(directory)))
    return directory


def config(shards: Path, **changes: object) -> ImageDataConfig:
    section = {
        "sources": [str(shards / "train")],
        "valid": [str(shards / "valid")],
        "image_size": 8,
        "channels": 1,
    }
    return ImageDataConfig.model_validate(section | changes)


def content(images: np.ndarray, labels: np.ndarray) -> Counter[tuple[bytes, int]]:
    return Counter((image.tobytes(), int(label)) for image, label in zip(images, labels))


def test_both_splits_together_are_the_digits(shards: Path, digits: Digits) -> None:
    train = data_images(config(shards), (8, 8), num_classes=10)
    valid = data_images(config(shards), (8, 8), split="valid", num_classes=10)
    assert train.count + valid.count == 1797 and train.count > 3 * valid.count
    assert train.labels is not None and valid.labels is not None
    # Pixel by pixel: nothing is lost on the way through shards, floats and back.
    assert content(train.read(), train.labels) + content(valid.read(), valid.labels) == content(*digits)
    assert "train" in train.name and train.left_out == 0


def test_limit_size_and_labels(shards: Path) -> None:
    some = data_images(config(shards), (16, 12), limit=50)
    assert (some.count, some.shape, some.labels) == (50, (16, 12, 1), None)
    # A model that packs images of any size is compared at one size.
    packed = config(shards, image_size=None, packing={"max_tokens": 64, "patch_size": 2})
    np.testing.assert_array_equal(
        data_images(packed, (8, 8), limit=50).read(), data_images(config(shards), (8, 8), limit=50).read()
    )


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(picture, format="PNG")
    whole = picture.getvalue()
    with tarfile.open(tmp_path / "part-0.tar", "w") as tar:
        for name, data in (("a", whole), ("b", whole[:-30]), ("c", whole)):
            for suffix, member in (("png", data), ("cls", b"0")):
                entry = tarfile.TarInfo(f"{name}.{suffix}")
                entry.size = len(member)
                tar.addfile(entry, io.BytesIO(member))
    section = {"sources": [str(tmp_path)], "image_size": 8, "channels": 1}
    found = data_images(ImageDataConfig.model_validate(section), (8, 8), num_classes=1)
    assert (found.count, found.left_out) == (2, 1)
    np.testing.assert_array_equal(found.read(), np.full((2, 8, 8, 1), 7, np.uint8))


def test_what_is_no_reference_is_named(shards: Path) -> None:
    with pytest.raises(ValueError, match="data are latents, which no extractor sees"):
        data_images(config(shards, content="latents"), (8, 8))
    with pytest.raises(ValueError, match=r"streamed \(data\.stream\)"):
        data_images(config(shards, stream=True), (8, 8))
    with pytest.raises(ValueError, match=r"no validation data \(data\.valid\)"):
        data_images(config(shards, valid=None), (8, 8), split="valid")
