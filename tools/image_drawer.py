"""Draws the images of one job, batch by batch: what every worker of `triptych sample` does.

Shape legend: B samples of a batch, C channels, H and W pixels, h and w of what the model draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.models import DiffusionConfig
from triptych.tools.images import Array
from triptych.tools.trained import load_trained
from triptych.training.conditions import Conditions
from triptych.training.decoding import LatentDecoder, latent_decoder, shows_pixels
from triptych.training.pictures import to_uint8
from triptych.training.sampling import Denoiser, SamplerConfig, draw, sample_keys


@dataclass(frozen=True)
class Job:
    """What is to be drawn, and with what; small enough to be sent to workers."""

    checkpoint: Path
    """One checkpoint, not a run: all workers take the same."""
    ema: bool
    """Whether its averages are taken, or the parameters themselves."""
    device: str
    sampler: SamplerConfig
    conditions: Conditions
    num: int
    batch_size: int
    size: tuple[int, ...]
    """(h, w)"""
    vae: str | None = None
    """Directory of the autoencoder that decodes latents; None leaves them as they are."""

    def batches(self) -> list[range]:
        """The numbers of the samples, batch by batch."""
        starts = range(0, self.num, self.batch_size)
        return [range(start, min(start + self.batch_size, self.num)) for start in starts]


class Drawer:
    """Holds a job's model on its device; `draw` makes any of its samples."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.trained = load_trained(job.checkpoint, job.device, ema=job.ema)
        assert isinstance(self.trained.model, DiffusionConfig), "jobs are made of denoisers"
        self.shape = (self.trained.model.in_channels, *job.size)
        self.denoiser = Denoiser(
            self.trained.train.objective,
            self.trained.model,
            self._predict,
            dtype=torch.float64 if self.trained.train.precision == "fp64" else torch.float32,
        )
        self.decoder: LatentDecoder | None = None
        if job.vae is not None:
            self.decoder = latent_decoder(job.vae, self.trained.data, self.trained.device)

    @torch.no_grad()
    def draw(self, numbers: range) -> Array:
        """uint8 (B, H, W, C), or float32 (B, C, h, w) of latents that the job has no decoder for.

        Each sample is a function of the job and its number, up to the rounding of batches of another size.
        Raises RuntimeError where one is not finite.
        """
        job = self.job
        chosen = torch.tensor(list(numbers), dtype=torch.int64, device=self.trained.device)
        keys = sample_keys(job.sampler.seed, chosen)
        images = draw(self.denoiser, job.sampler, keys, self.shape, job.conditions.of(chosen))
        if self.decoder is not None:
            images = self.decoder(images)
        elif not shows_pixels(self.trained.data):
            return images.float().cpu().numpy()
        return to_uint8(images)

    def _predict(self, batch: dict[str, Any]) -> Tensor:
        with self.trained.autocast():
            return self.trained.module(batch["x"], **self.trained.module.keywords(batch))
