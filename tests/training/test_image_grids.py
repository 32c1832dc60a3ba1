"""The grid of a training run: the same under every layout, from the averages, and always written whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.training.vae import tiny_vae
from triptych import models
from triptych.data_pipeline.kinds import read_config as read_data
from triptych.kernels.random import string_key
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import Layout, build_mesh
from triptych.parallel.local import run_local
from triptych.parallel.model import ParallelModel
from triptych.parallel.parallelize import parallelize
from triptych.training import image_grids
from triptych.training.config import LogConfig, TrainConfig
from triptych.training.ema import EMA
from triptych.training.image_grids import ImageGridConfig, ImageGrids, save_grid
from triptych.training.pictures import GAP, Pictures
from triptych.training.session import PARAMETER_DTYPES

CPU = torch.device("cpu")
CLASSES = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp_shard2": {"dp_shard": 2},
    "dp_replicate3": {"dp_replicate": 3},
    "tp2 dp_shard2": {"tp": 2, "dp_shard": 2},
}
# Five images: no number of data ranks above deals them evenly.
IMAGES: dict[str, Any] = {
    "every": 1,
    "count": 5,
    "columns": 3,
    "sampler": {"method": "sde", "steps": 3, "guidance": {"scale": 2.0}, "seed": 4},
}


def run_of(parallel: dict[str, Any], images: dict[str, Any] = IMAGES, **changes: Any) -> Any:
    """The sections of a small DiT on grey 8 by 8 images, in float64."""
    model = {
        "family": "diffusion",
        "hidden_size": 16,
        "num_layers": 4,
        "attention": {"num_heads": 2},
        "in_channels": 1,
        "input_size": [8, 8],
        "patch_size": 4,
        "conditioning": {"kind": "class", "num_classes": CLASSES},
        **changes.get("model", {}),
    }
    data = {"kind": "images", "sources": ["nowhere"], "image_size": [8, 8], **changes.get("data", {})}
    train = {"steps": 9, "global_batch_size": 12, "micro_batch_size": 2, "precision": "fp64"}
    train |= changes.get("train", {})
    return SimpleNamespace(
        model=models.read_config(model),
        data=read_data({"channels": 1, **data}),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig.model_validate(train | {"ema": {"decay": 0.5, "warmup": False}}),
        log=LogConfig.model_validate({"images": images}),
    )


def build(run: Any) -> ParallelModel:
    """This rank's part of the run's model, with random weights everywhere, also where they start as zero."""
    layout = Layout(run.parallel)
    model = parallelize(
        run.model,
        run.parallel,
        mesh=build_mesh(layout, "cpu"),
        device=CPU,
        dtype=PARAMETER_DTYPES[run.train.precision],
        autocast_dtype=torch.bfloat16 if run.train.precision == "bf16" else None,
        seed=0,
        seq_len=run.model.num_tokens,
        micro_batch_size=2,
        num_micro_batches=2,
    )
    with torch.no_grad():
        for shard in model.shards():
            shard.tensor.copy_(0.2 * weight(shard)[slices(shard)])
    return model


def weight(shard: Any) -> Tensor:
    """The whole tensor that a shard is of."""
    generator = torch.Generator().manual_seed(string_key(0, shard.name))
    return torch.randn(shard.global_shape, generator=generator, dtype=torch.float64)


def slices(shard: Any) -> tuple[slice, ...]:
    return tuple(slice(low, low + size) for low, size in zip(shard.offset, shard.tensor.shape, strict=True))


def rendered(
    parallel: dict[str, Any], images: dict[str, Any] = IMAGES
) -> tuple[Pictures | None, Pictures | None]:
    """Body of a rank: the grid of the average, and that of the parameters, which are twice the average."""
    run = run_of(parallel, images)
    model = build(run)
    ema = EMA(model.named_parameters(), run.train.ema)
    with torch.no_grad():
        for shard in model.shards():
            shard.tensor.mul_(2.0)
    probe = {
        "x": torch.ones(2, 1, 8, 8).double(),
        "times": torch.ones(2).double(),
        "labels": torch.ones(2).long(),
    }
    before = model.predict(probe)
    averaged = ImageGrids(run, model, ema).render()
    assert torch.equal(model.predict(probe), before), "the parameters did not come back"
    return averaged, ImageGrids(run, model, None).render()


@pytest.fixture(scope="module")
def alone() -> tuple[Pictures, Pictures]:
    ((averaged, own),) = run_local(1, rendered, {})
    return averaged, own


def test_a_grid_is_drawn_from_the_averages(alone: tuple[Pictures, Pictures]) -> None:
    averaged, own = alone
    assert averaged.shape == (2 * 34 + GAP, 3 * 34 + GAP, 1)
    cells = [
        averaged[GAP + 34 * row :, GAP + 34 * column :][:32:4, :32:4] for row in (0, 1) for column in range(3)
    ]
    assert len({cell.tobytes() for cell in cells}) == 6 and (cells[5] == 128).all()
    assert not np.array_equal(averaged, own)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_same(
    layout: str, alone: tuple[Pictures, Pictures], distributed: Callable[..., list[Any]]
) -> None:
    parallel = LAYOUTS[layout]
    results = distributed(ParallelConfig(**parallel).world_size, rendered, parallel)
    for got, expected in zip(results[0], alone, strict=True):
        # In float64 a byte moves only if a value lies on the border to its neighbour.
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1
        assert (got != expected).mean() < 1e-3
    assert all(result == (None, None) for result in results[1:])


def rendered_in(precision: str, parallel: dict[str, Any]) -> Pictures | None:
    """Body of a rank: the grid of the parameters."""
    run = run_of(parallel, train={"precision": precision})
    return ImageGrids(run, build(run), None).render()


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp_shard2"])
def test_bf16_draws_nearly_the_same(layout: str, distributed: Callable[..., list[Any]]) -> None:
    (expected,) = distributed(1, rendered_in, "fp32", {})
    grids = distributed(2, rendered_in, "bf16", LAYOUTS[layout])
    # Eight bits of mantissa, through two steps and four blocks.
    assert 0 < np.abs(grids[0].astype(int) - expected.astype(int)).mean() < 4


def first_images(count: int) -> Pictures:
    ((averaged, _),) = run_local(1, rendered, {}, {**IMAGES, "count": count, "columns": 1})
    return averaged


def test_an_image_does_not_depend_on_how_many_there_are() -> None:
    two, four = first_images(2), first_images(4)
    np.testing.assert_array_equal(two[:68], four[:68])


def latents(channels: int) -> Any:
    """A run on latents; its model is not trained, and outputs zero."""
    data = {"content": "latents", "channels": channels}
    return run_of({}, model={"in_channels": channels}, data=data)


def rendered_latents(channels: int, vae: str | None) -> Pictures | None:
    """Body of a rank: the grid of a run on latents."""
    run = latents(channels)
    images = {**IMAGES, "vae": vae}
    run.log = LogConfig.model_validate({"images": images})
    return ImageGrids(run, build(run), None).render()


def test_latents_are_shown_as_they_are_or_decoded(tmp_path: Path) -> None:
    (raw,) = run_local(1, rendered_latents, 4, None)
    assert raw.shape == (2 * 34 + GAP, 3 * 34 + GAP, 3)
    # Stretched to the full range, picture by picture.
    assert {0, 255} & set(np.unique(raw[GAP:34, GAP:34]))
    vae = tiny_vae(tmp_path / "vae", channels=4)
    (decoded,) = run_local(1, rendered_latents, 4, str(vae))
    # One level of the autoencoder doubles the sides.
    assert decoded.shape == (2 * 34 + GAP, 3 * 34 + GAP, 3) and not np.array_equal(decoded, raw)


def spoiled(every: bool) -> tuple[Pictures | None, list[str]]:
    """Body of a rank: the grid of a model that diverged, and the warnings."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    image_grids.log.addHandler(handler)
    run = run_of({})
    model = build(run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "label_embedding.weight":
                parameter[slice(None) if every else 1] = torch.nan
    return ImageGrids(run, model, None).render(), said


@pytest.mark.parametrize(("every", "bad"), [(True, {0, 1, 2, 3, 4}), (False, {1, 4})])
def test_images_that_are_not_finite_are_grey(
    every: bool, bad: set[int], distributed: Callable[..., list[Any]]
) -> None:
    ((grid, said),) = distributed(1, spoiled, every)
    cells = [grid[GAP + 34 * (n // 3) :, GAP + 34 * (n % 3) :][:32, :32] for n in range(5)]
    assert {n for n, cell in enumerate(cells) if (cell == 128).all()} == bad
    assert sum(int(line.split()[0]) for line in said) == len(bad) and "not finite" in said[0]


def test_the_file_of_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    save_grid(picture, tmp_path, 250)
    with Image.open(tmp_path / "samples" / "step-00000250.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
    (tmp_path / "file").touch()
    save_grid(picture, tmp_path / "file", 1)
    assert "the images of step 1 were not written" in caplog.text


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(run: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            ImageGrids(run, SimpleNamespace(predict=None, device=CPU), None)  # type: ignore[arg-type]

    refused(run_of({}, {**IMAGES, "vae": str(tmp_path)}), "this model draws pixels; leave it out")
    refused(run_of({}, model={"input_size": [4, 8, 8], "hidden_size": 24}), r"has 3 dimension\(s\)")
    refused(run_of({}, {**IMAGES, "texts": "a.npy"}), "texts a.npy for a model of")
    language = run_of({})
    language.model = models.read_config({"vocab_size": 8, "hidden_size": 16, "num_layers": 1})
    refused(language, r"model\.family=lm; set log\.images=null")
    with pytest.raises(ValueError, match="count"):
        ImageGridConfig(count=0)
