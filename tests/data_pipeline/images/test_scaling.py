"""Latents: drawn from their posterior, scaled once and never twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.data_pipeline import ImageDataset
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.needs import ImageNeeds

from .samples import config, npy, write_shards

SHAPE = (4, 3, 5)
FACTOR = 0.18215


def latents(
    directory: Path, *, std: float = 1 / FACTOR, spread: float = 0.0, count: int = 8, shift: float = 0.0
) -> str:
    """Means of that standard deviation, with a posterior of deviation `spread`."""
    draw = np.random.default_rng(0)
    samples = [
        {
            "mean.npy": npy((shift + std * draw.standard_normal(SHAPE)).astype(np.float16)),
            "std.npy": npy(np.full(SHAPE, spread, np.float16)),
        }
        for _ in range(count)
    ]
    return write_shards(directory, samples)


def describe(directory: Path, **values: Any) -> None:
    values = {"vae": "sd-vae-ft-ema", "scale_factor": FACTOR, **values}
    Description("latents", 4, (3, 5), 8, 2, **values).write(directory)


def opened(path: str, **options: Any) -> ImageDataset:
    options = {"content": "latents", "channels": 4, "image_size": [3, 5], **options}
    return ImageDataset(config(path, **options), 0, global_batch_size=4)


def means(path: str) -> np.ndarray:
    """(8, C, h, w) as stored, in the order of the files."""
    draw = np.random.default_rng(0)
    return np.stack([(draw.standard_normal(SHAPE) / FACTOR).astype(np.float16) for _ in range(8)])


def test_scaled_as_the_description_says(tmp_path: Path) -> None:
    path = latents(tmp_path)
    describe(tmp_path, shift_factor=0.5)
    data = opened(path)
    found = sorted((data.sample(i)["x"] for i in range(8)), key=lambda x: x.sum())
    expected = sorted(((x.astype(np.float64) - 0.5) * FACTOR for x in means(path)), key=lambda x: x.sum())
    assert found[0].dtype == np.float32 and np.allclose(found, expected, atol=1e-5)


def test_scaled_as_the_configuration_says_where_nothing_else_does(tmp_path: Path) -> None:
    path = latents(tmp_path)
    data = opened(path, vae={"scale_factor": FACTOR, "shift_factor": -1.0})
    found = sorted((data.sample(i)["x"] for i in range(8)), key=lambda x: x.sum())
    expected = sorted(((x.astype(np.float64) + 1.0) * FACTOR for x in means(path)), key=lambda x: x.sum())
    assert np.allclose(found, expected, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"nothing says how the latents .* are scaled.*set data.vae.scale_factor"
    ):
        opened(path)


def test_draws_have_the_posterior_of_the_shard(tmp_path: Path) -> None:
    """Over many epochs: the mean is the mean, the deviation the deviation; each draw is keyed by the
    sample."""
    path = latents(tmp_path, std=1.0, spread=0.5, count=1)
    data, again = opened(path, vae={"scale_factor": 2.0}), opened(path, vae={"scale_factor": 2.0})
    draws = np.stack([data.sample(i)["x"] for i in range(2000)])
    assert np.array_equal(again.sample(1234)["x"], draws[1234])
    mean = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    z = (draws - 2.0 * mean.astype(np.float64)) / (2.0 * 0.5)
    assert abs(z.mean()) < 5 / z.size**0.5
    assert abs(z.std() - 1) < 5 / (2 * z.size) ** 0.5
    assert abs(z.mean(axis=0)).max() < 5 / 2000**0.5


def test_marked_as_scaled_already(tmp_path: Path) -> None:
    path = latents(tmp_path, std=1.0)
    describe(tmp_path, scaled=True)
    for vae in ({"scale_factor": FACTOR}, {"shift_factor": 0.1}):
        with pytest.raises(
            ValueError, match=r"are scaled already \(dataset.json: scaled true\).* remove both"
        ):
            opened(path, vae=vae)
    draw = np.random.default_rng(0)
    expected = draw.standard_normal(SHAPE).astype(np.float16)
    for vae in ({}, {"scale_factor": 1.0}):
        data = opened(path, vae=vae)
        assert any(np.array_equal(data.sample(i)["x"], expected) for i in range(8))


@pytest.mark.parametrize("recorded", [None, 1 / FACTOR])
def test_values_that_are_scaled_already(tmp_path: Path, recorded: float | None) -> None:
    """Not marked, but their standard deviation is 1 and not 5.5."""
    path = latents(tmp_path, std=1.0)
    describe(tmp_path, latent_std=recorded)
    with pytest.raises(
        ValueError, match=r"have standard deviation 1\.?\d*, which is that of scaled ones .* twice"
    ):
        opened(path)
    with pytest.raises(ValueError, match=r"which is that of scaled ones"):
        (tmp_path / "dataset.json").unlink()
        opened(path, vae={"scale_factor": FACTOR})
    assert opened(path, vae={"scale_factor": 1.0}).num_images == 8


def test_values_that_are_as_recorded_are_no_mistake(tmp_path: Path) -> None:
    """An untrained autoencoder gives latents of any scale; what the shards say of themselves counts."""
    path = latents(tmp_path, std=1.0)
    describe(tmp_path, latent_std=1.0)
    assert opened(path).num_images == 8
    # Where the factor is about 1 nothing can be told, and so nothing is refused.
    describe(tmp_path, scale_factor=0.9)
    assert opened(path).num_images == 8


def test_the_autoencoder_is_compared(tmp_path: Path) -> None:
    path = latents(tmp_path)
    describe(tmp_path)
    assert opened(path, vae={"id": "sd-vae-ft-ema", "scale_factor": FACTOR}).num_images == 8
    with pytest.raises(ValueError, match=r"holds latents of sd-vae-ft-ema, not of data.vae.id=other"):
        opened(path, vae={"id": "other"})
    with pytest.raises(ValueError, match=r"data.vae.scale_factor=0.13025, but dataset.json .* says 0.18215"):
        opened(path, vae={"scale_factor": 0.13025})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"channels": 3},
            r"8 of 8 samples .* have another number of channels than data.channels=3.*\[4, 3, 5\]",
        ),
        (
            {"image_size": 4},
            r"not in data.image_size=\[\[4, 4\]\].*with \[3, 5\]. To mend it, set data.image_size",
        ),
        (
            {"image_size": None, "buckets": {"sizes": [[3, 3], [5, 3]]}},
            r"not in data.buckets=\[\[3, 3\], \[5, 3\]\]",
        ),
        (
            {"image_size": None, "packing": {"max_tokens": 20, "patch_size": 2}},
            r"no multiples of data.packing.patch_size=2, or give more than 20 tokens",
        ),
        (
            {"image_size": None, "packing": {"max_tokens": 20, "patch_size": 1, "max_image_tokens": 14}},
            r"more than 14 tokens",
        ),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    path = latents(tmp_path)
    describe(tmp_path)
    with pytest.raises(ValueError, match=match):
        opened(path, **options)


def test_latents_in_buckets_and_packs(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sizes = [(2, 4), (4, 2), (2, 2)] * 5
    values = [5 * draw.standard_normal((4, *size)) for size in sizes]
    path = write_shards(
        tmp_path, [{"mean.npy": npy(x.astype(np.float32)), "std.npy": npy(0 * x)} for x in values]
    )
    options = {"content": "latents", "channels": 4, "vae": {"scale_factor": 0.2}}
    buckets = ImageDataset(
        config(path, buckets={"sizes": [[2, 2], [2, 4], [4, 2]]}, **options), 0, global_batch_size=4
    )
    found = [buckets.sample(i) for i in range(buckets.sources[0].samples_per_epoch)]
    real = sorted((row["x"] for row in found if row["valid"]), key=lambda x: float(x.sum()))
    expected = sorted((0.2 * x for x in values), key=lambda x: float(x.sum()))
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(real, expected, strict=True))
    packing = {"max_tokens": 6, "max_images": 3, "patch_size": 2}
    packed = ImageDataset(config(path, packing=packing, **options), 0, ImageNeeds(channels=4))
    rows = [packed.sample(i) for i in range(packed.sources[0].samples_per_epoch)]
    assert sum(int(row["valid"].sum()) for row in rows) == 15
    total = sum(float(row["x"].sum(dtype=np.float64)) for row in rows)
    assert total == pytest.approx(sum(float(0.2 * x.sum()) for x in values), abs=1e-3)


def test_values_that_are_not_finite_or_of_another_shape_than_the_header_says(tmp_path: Path) -> None:
    samples = [{"mean.npy": npy(np.zeros(SHAPE)), "std.npy": npy(np.zeros(SHAPE))} for _ in range(6)]
    samples[1] = {"mean.npy": npy(np.full(SHAPE, np.nan)), "std.npy": npy(np.zeros(SHAPE))}
    samples[2] = {"mean.npy": npy(np.zeros(SHAPE)), "std.npy": npy(np.zeros((1, 3, 5)))}
    samples[3] = {"mean.npy": npy(np.zeros(SHAPE))[:-8], "std.npy": npy(np.zeros(SHAPE))}
    samples[4] = {"mean.npy": npy(np.zeros(SHAPE)), "std.npy": npy(np.array([{}], dtype=object))}
    data = opened(write_shards(tmp_path, samples), vae={"scale_factor": 1.0})
    rows = [data.sample(i) for i in range(6)]
    assert sum(row["valid"] for row in rows) == 2 and len(data.bad) == 4
    told = " ".join(data.bad.names)
    assert "not finite" in told and "(1, 3, 5)" in told and "Object arrays cannot be loaded" in told
