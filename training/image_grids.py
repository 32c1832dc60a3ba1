"""Grids of images drawn while a denoiser trains, always from the same noise: how it learns, seen.

Shape legend: B samples of a batch, C channels, H and W pixels (or latents).
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from triptych.models.diffusion_config import DiffusionConfig
from triptych.parallel.model import ParallelModel
from triptych.training.conditions import Conditions, conditions
from triptych.training.decoding import LatentDecoder, latent_decoder, shows_pixels
from triptych.training.ema import EMA
from triptych.training.objectives.protocol import Batch
from triptych.training.pictures import Pictures, grid, latents_to_uint8, to_uint8, write_png
from triptych.training.sampling import Denoiser, SamplerConfig, draw, sample_keys
from triptych.training.sampling.draw import check_sampler

if TYPE_CHECKING:
    # training.config holds ImageGridConfig, so at run time the arrow is the other one.
    from triptych.training.sections import RunSections

log = logging.getLogger("triptych.training.image_grids")

DIRECTORY = "samples"
"""Name of the directory of grids in a run directory."""


class ImageGridConfig(BaseModel):
    """`log.images:`, a grid of images drawn every so often from the averaged parameters (the parameters
    themselves without train.ema), to TensorBoard and <run>/samples/step-<step>.png."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(default=0, ge=0)
    """Steps between two grids, of which one also comes after the last step; 0 draws none."""
    count: int = Field(default=16, ge=1)
    """Images of a grid. Labels take turns: with as many columns as classes, a column is a class."""
    columns: int = Field(default=8, ge=1)
    """Images in a row of the grid."""
    sampler: SamplerConfig = SamplerConfig()
    """How they are drawn; sampler.seed chooses the noise, the same in every grid."""
    texts: str | None = None
    """Of models with text conditioning: a .npy (texts, length, channels) of embedded texts, taken in turn."""
    vae: str | None = None
    """Of models of latents: directory of the diffusers AutoencoderKL to decode with. Unset: the first three
    channels of the latents are shown, in which shapes can be recognised and colours mean nothing."""


class ImageGrids:
    """Draws the grids of a run. One on every rank; `render` is called by all of them at once.

    The samples are dealt to the data ranks; every sample is a function of its number, so the grid is the same
    under every layout, up to rounding. ema: whose averages are drawn from; None: from the parameters.
    Raises ValueError for what `log.images` gets wrong.
    """

    def __init__(self, run: RunSections, model: ParallelModel, ema: EMA | None) -> None:
        config = run.log.images
        assert config is not None, "a run without log.images has no grids"
        self.conditions = check_grids(run)
        assert isinstance(run.model, DiffusionConfig), "refused by check_grids"
        self.config = config
        self.model = model
        self.ema = ema
        self.shape = (run.model.in_channels, *run.model.input_size)
        self.denoiser = Denoiser(
            run.train.objective,
            run.model,
            model.predict,
            dtype=torch.float64 if run.train.precision == "fp64" else torch.float32,
        )
        self.decoder: LatentDecoder | None = None
        if config.vae is not None:
            self.decoder = latent_decoder(config.vae, run.data, model.device)
        self.is_pixels = self.decoder is not None or shows_pixels(run.data)
        self._batch_size = run.train.micro_batch_size
        self._world = dist.get_world_size()
        ranks = [model.layout.dp_rank(rank) for rank in range(self._world)]
        self._rank = dist.get_rank()
        self._dp_rank, self._dp_size = ranks[self._rank], model.layout.dp_size
        # Of the ranks that compute the same images, the first hands them over.
        self._is_first = ranks.index(self._dp_rank) == self._rank

    def render(self) -> Pictures | None:
        """The grid (H', W', C) on rank 0, None elsewhere. All ranks of a run call it together, between steps.

        An image that is not finite is grey, with a warning.
        """
        share = -(-self.config.count // self._dp_size)
        # As many on every rank, for they compute together; what is beyond the count is drawn twice.
        first = self._dp_rank * share
        mine = [number % self.config.count for number in range(first, first + share)]
        pictures: dict[int, Pictures] = {}
        with nullcontext() if self.ema is None else self.ema.swapped():
            for start in range(0, share, self._batch_size):
                numbers = mine[start : start + self._batch_size]
                pictures |= dict(zip(numbers, self._pictures(numbers), strict=True))
        gathered: list[dict[int, Pictures]] = [{}] * self._world
        dist.gather_object(pictures if self._is_first else {}, gathered if self._rank == 0 else None)
        if self._rank != 0:
            return None
        whole = {number: picture for part in gathered for number, picture in part.items()}
        return grid(np.stack([whole[number] for number in range(self.config.count)]), self.config.columns)

    def _pictures(self, numbers: list[int]) -> Pictures:
        chosen = torch.tensor(numbers, dtype=torch.int64, device=self.model.device)
        keys = sample_keys(self.config.sampler.seed, chosen)
        images = draw(self.denoiser, self.config.sampler, keys, self.shape, self.conditions.of(chosen))
        if self.decoder is not None:
            images = self.decoder(images)
        images = self._finite(images)
        return to_uint8(images) if self.is_pixels else latents_to_uint8(images)

    def _finite(self, images: Tensor) -> Tensor:
        bad = ~torch.isfinite(images).flatten(1).all(dim=1)
        if not bool(bad.any()):
            return images
        log.warning("%d of %d images of the grid are not finite", int(bad.sum()), len(images))
        return torch.where(bad.reshape(-1, 1, 1, 1), torch.zeros_like(images), images)


def check_grids(run: RunSections) -> Conditions:
    """What the images of log.images are drawn for. Raises ValueError for what log.images gets wrong."""
    config, model = run.log.images, run.model
    assert config is not None, "a run without log.images has no grids"
    if not isinstance(model, DiffusionConfig):
        raise ValueError(
            f"log.images draws with a denoiser, and model.family={model.family}; set log.images=null"
        )
    if len(model.input_size) != 2:
        raise ValueError(
            f"log.images shows images, and model.input_size={list(model.input_size)} has "
            f"{len(model.input_size)} dimension(s); set log.images=null"
        )
    try:
        check_sampler(config.sampler, Denoiser(run.train.objective, model, _never))
        return conditions(model.conditioning, texts=config.texts)
    except ValueError as error:
        raise ValueError(f"log.images: {error}; or set log.images=null") from error


def _never(batch: Batch) -> Tensor:
    raise AssertionError("a sampler is checked without drawing")


def save_grid(picture: Pictures, run_dir: Path, step: int) -> None:
    """Write a grid to <run>/samples/step-<step>.png; a file system that refuses gives a warning only."""
    path = run_dir / DIRECTORY / f"step-{step:08d}.png"
    try:
        write_png(path, picture, [("step", str(step))])
    except OSError as error:
        log.warning("the images of step %d were not written: %s", step, error)
