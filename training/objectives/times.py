"""The distribution of training times: transforms of one uniform number per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triptych.kernels import hash_uniform
from triptych.training.objectives.config import TimesConfig
from triptych.training.objectives.draws import stream
from triptych.training.objectives.paths import Path

_MODE_SCALE = 1.29  # Stable Diffusion 3's
_EDM_MEAN, _EDM_STD = -1.2, 1.2


def times_of(config: TimesConfig, uniform: Tensor) -> Tensor:
    """Times (float64) at `uniform`, numbers in (0, 1); monotone in them, so that strata stay strata.

    All kinds but mode rise with the uniform number; mode falls, as in its paper.
    """
    if config.kind == "edm":
        return torch.exp(_normal(config, uniform, _EDM_MEAN, _EDM_STD))
    if config.kind == "uniform":
        t = uniform
    elif config.kind == "logit_normal":
        t = torch.sigmoid(_normal(config, uniform, 0.0, 1.0))
    else:
        scale = _MODE_SCALE if config.scale is None else config.scale
        t = 1 - uniform - scale * (torch.cos(math.pi / 2 * uniform).square() - 1 + uniform)
    return shifted(t, config.shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards the noise by shift > 1, the ends kept (arXiv 2403.03206, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(config: TimesConfig, path: Path, keys: Tensor) -> Tensor:
    """One time of the path (float64) per key, shaped like `keys` (int64)."""
    uniform = hash_uniform(stream(keys, "objective.time"), torch.zeros_like(keys))
    return path.snap(times_of(config, uniform))


def _normal(config: TimesConfig, uniform: Tensor, mean: float, std: float) -> Tensor:
    mean = mean if config.mean is None else config.mean
    std = std if config.std is None else config.std
    return mean + std * torch.special.ndtri(uniform)
