"""Images from noise: a denoiser taken through the steps of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from triptych.kernels import hash_bits, string_key
from triptych.training.objectives.draws import Rows, image_noise, token_noise
from triptych.training.objectives.paths import DDPMPath, EDMPath
from triptych.training.objectives.predictions import Prediction
from triptych.training.sampling.config import SamplerConfig
from triptych.training.sampling.denoiser import Conditioning, Denoiser
from triptych.training.sampling.solvers import STEPS, step_times


def sample_keys(seed: int, numbers: Tensor) -> Tensor:
    """Keys (int64) of the samples of these numbers (int64, any shape): sample 7 of a seed is always the
    same."""
    return hash_bits(string_key(seed, "sampling"), numbers)


@torch.no_grad()
def draw(
    denoiser: Denoiser,
    config: SamplerConfig,
    keys: Tensor,
    shape: tuple[int, ...],
    conditioning: Conditioning,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Samples in the denoiser's dtype, each a function of its own key and conditioning and not of the others.

    keys: int64 (B,), and shape (C, *space) of a sample -> images (B, C, *space). With conditioning of packed
    rows (positions, document_ids, sizes): keys (B, G), one per image, shape (T, C P P) -> tokens (B, T, C P
    P). conditioning: labels, 0 .. num_classes where that last means none, or text, as the model has it.
    progress: called with (steps done, steps in all).
    Raises ValueError for a sampler that does not fit the model or its objective, and for wrong conditioning.
    """
    check_sampler(config, denoiser)
    _check_conditioning(denoiser, keys, conditioning)
    path, step = denoiser.path, STEPS[config.method]
    times = step_times(config, denoiser.objective, path)

    def noise(purpose: str) -> Tensor:
        if "document_ids" not in conditioning:
            return image_noise(keys, shape, f"sampling.{purpose}")
        rows = Rows(conditioning["positions"], conditioning["document_ids"], conditioning["sizes"])
        model = denoiser.model
        return token_noise(keys, rows, model.in_channels, model.patch_size, f"sampling.{purpose}")

    def denoise(x: Tensor, t: float) -> Prediction:
        prediction = denoiser(x, t, conditioning, config.guidance)
        return prediction if config.clip is None else clipped(denoiser, prediction, x, t, config.clip)

    x = path.at(torch.tensor(times[0], dtype=torch.float64, device=keys.device)).sigma * noise("start")
    for number, (t, s) in enumerate(pairwise(times)):
        x = step(denoise, path, x, t, s, partial(noise, f"step.{number}"), config)
        if progress is not None:
            progress(number + 1, len(times))
    x = denoise(x, times[-1]).x0
    if progress is not None:
        progress(len(times), len(times))
    return x.to(denoiser.dtype)


def clipped(denoiser: Denoiser, prediction: Prediction, x: Tensor, t: float, limit: float) -> Prediction:
    """The prediction with x0 in [-limit, limit] and the noise that then is in x_t."""
    x0 = prediction.x0.clamp(-limit, limit)
    at = denoiser.path.at(torch.tensor(t, dtype=torch.float64, device=x.device))
    return Prediction(x0, (x - at.alpha * x0) / at.sigma, prediction.variance)


def check_sampler(config: SamplerConfig, denoiser: Denoiser) -> None:
    """Raises ValueError, naming the keys, where the sampler does not fit the model or its objective."""
    path, model, guidance = denoiser.path, denoiser.model, config.guidance
    if isinstance(path, DDPMPath) and config.steps > path.steps:
        raise ValueError(
            f"steps={config.steps} is more than the {path.steps} of train.objective.path=ddpm; use at most "
            f"{path.steps}"
        )
    if isinstance(path, DDPMPath | EDMPath) and config.shift != 1:
        raise ValueError(
            f"shift={config.shift} moves times of a continuous path, and train.objective.path="
            f"{denoiser.objective.path} has steps of its own; remove it"
        )
    if guidance.scale != 1 and model.conditioning.kind == "none":
        raise ValueError(
            f"guidance.scale={guidance.scale} needs a conditional model, and model.conditioning.kind=none; "
            "use 1"
        )
    if guidance.channels is not None and guidance.channels > model.in_channels:
        raise ValueError(
            f"guidance.channels={guidance.channels} is more than model.in_channels={model.in_channels}; use "
            "at most that, or leave it out for all"
        )
    highest = path.sigma_max if isinstance(path, EDMPath) else 1.0
    if guidance.interval is not None and guidance.interval[0] > highest:
        raise ValueError(
            f"guidance.interval={list(guidance.interval)} is beyond the noise at t={highest:g}; t is "
            f"{'sigma' if isinstance(path, EDMPath) else '0 at the data and 1 at the noise'}"
        )


def _check_conditioning(denoiser: Denoiser, keys: Tensor, conditioning: Mapping[str, Tensor]) -> None:
    section = denoiser.model.conditioning
    name = {"class": "labels", "text": "text"}.get(section.kind)
    if name is None:
        return
    if name not in conditioning:
        raise ValueError(
            f"a model of model.conditioning.kind={section.kind} draws with {name}; give one per sample"
        )
    value = conditioning[name]
    if value.shape[: keys.ndim] != keys.shape:
        raise ValueError(
            f"{name} of shape {list(value.shape)} for {list(keys.shape)} samples; give one per sample"
        )
    if section.kind == "class":
        wrong = (value < 0) | (value > section.num_classes)
        if bool(wrong.any()):
            raise ValueError(
                f"label {int(value[wrong][0])} is out of range: use 0 to {section.num_classes - 1}, or "
                f"{section.num_classes} for none (model.conditioning.num_classes={section.num_classes})"
            )
