"""The section `data:` with kind images: what it says about shapes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from triptych.data_pipeline import ImageDataConfig
from triptych.data_pipeline.images.needs import ImageNeeds
from triptych.data_pipeline.images.options import LatentsOptions

from .samples import config


def test_a_path_alone_and_a_square() -> None:
    data = config("a", {"path": "b", "weight": 2, "name": "bees"}, image_size=8, channels=3, stream=False)
    assert [(source.label, source.weight) for source in data.sources] == [("a", 1.0), ("bees", 2.0)]
    assert data.image_size == (8, 8) and data.shapes == ((3, 8, 8),) and data.stream is None
    assert data.num_tokens(2) == 16
    assert config("a", stream=True).stream is not None
    assert config("a", image_size=[4, 8]).num_tokens(4) == 2


def test_buckets_by_area_and_aspect() -> None:
    data = config("a", buckets={"area": 256 * 256, "aspects": [1.0, 0.5, 2.0, 1.01], "multiple": 16})
    # sqrt(65536 / 2) = 181.02, to 16ths 11.3; 1.01 rounds to the square, which stands there once.
    assert data.shapes == ((1, 256, 256), (1, 176, 368), (1, 368, 176))
    assert data.num_tokens(16) == 256


def test_packing_has_the_shape_of_its_rows() -> None:
    data = config("a", channels=3, packing={"max_tokens": 32, "max_images": 3, "patch_size": 2})
    assert data.shapes == ((32, 12),) and data.num_tokens(2) == 32
    with pytest.raises(ValueError, match=r"data.packing.patch_size=2 is not model.patch_size=4"):
        data.num_tokens(4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": None}, "nothing says how large samples are"),
        ({"image_size": 4, "buckets": {"sizes": [[4, 4]]}}, "image_size and buckets says how large"),
        ({"image_size": [0, 4]}, "must be at least 1"),
        ({"channels": 4}, r"channels=4: images have 1 \(grey\) or 3"),
        ({"content": "latents", "augment": {"flip": True}}, "latents are not cropped or flipped"),
        ({"buckets": {"sizes": [[4, 4]], "area": 16}}, "give one of the two"),
        ({"buckets": {"area": 16}}, "give one of the two"),
        ({"buckets": {"sizes": [[0, 4]]}}, "at least 1"),
        ({"buckets": {"area": 16, "aspects": [-1.0]}}, "must be positive"),
        ({"packing": {"max_tokens": 4, "patch_size": 1, "max_image_tokens": 9}}, "does not fit a row"),
        (
            {"packing": {"max_tokens": 4, "patch_size": 1}, "augment": {"crop": "random_resized"}},
            "packing keeps whole images",
        ),
        ({"stream": True, "buckets": {"sizes": [[4, 4]]}}, "which streams do not have"),
        ({"augment": {"scale": [0.5, 0.1]}}, r"scale=\[0.5, 0.1\] must be rising"),
        ({"sources": []}, "no source is listed"),
        ({"sources": ["a", "a"]}, "a is listed twice"),
        ({"sources": [{"path": "a", "weight": 0}]}, "must be a positive finite number"),
        ({"colour": True}, "Extra inputs are not permitted"),
        ({"kind": "text"}, "Input should be 'images'"),
    ],
)
def test_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        ImageDataConfig.model_validate(config("a").model_dump(exclude_unset=True) | _sized(options))


def _sized(options: dict[str, Any]) -> dict[str, Any]:
    """Without the image_size of the base where the options say a size themselves."""
    return (
        options
        if "image_size" in options or not {"buckets", "packing"} & set(options)
        else options | {"image_size": None}
    )


def test_latent_options_want_one_size() -> None:
    for sizes in ({}, {"image_size": 8, "max_tokens": 4}):
        with pytest.raises(ValidationError, match="give exactly one of image_size, sizes and max_tokens"):
            LatentsOptions.model_validate({"source": "a", "vae": "v", "out": "o", **sizes})


@pytest.mark.parametrize(
    ("needs", "match"),
    [
        (ImageNeeds(channels=3), "data.channels=1 is not model.in_channels=3"),
        (ImageNeeds(size=(8, 8)), r"data.image_size=\[4, 6\] is not model.input_size=\[8, 8\]"),
        (ImageNeeds(patch_size=4), r"model.patch_size=4 does not divide data.image_size \[4, 6\].*\[4, 4\]"),
    ],
)
def test_what_the_model_asks_for(needs: ImageNeeds, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        needs.check(config("a", image_size=[4, 6]))


def test_what_the_model_asks_for_of_buckets_and_packing() -> None:
    with pytest.raises(ValueError, match=r"model.patch_size=4 does not divide data.buckets \[4, 6\]"):
        ImageNeeds(patch_size=4).check(config("a", buckets={"sizes": [[4, 8], [4, 6]]}))
    with pytest.raises(ValueError, match=r"data.buckets=\[4, 6\] is not model.input_size=\[4, 8\]"):
        ImageNeeds(size=(4, 8)).check(config("a", buckets={"sizes": [[4, 8], [4, 6]]}))
    with pytest.raises(ValueError, match=r"data.packing has no text"):
        ImageNeeds(text=(4, 8)).check(config("a", packing={"max_tokens": 4, "patch_size": 1}))
