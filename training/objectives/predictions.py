"""What a model's output means: conversions among the image, the noise, velocity, score, v and EDM's output.

Each kind is linear: given x_t and t, the image and the noise are a combination of x_t and the output. All
conversions go through that pair, so n kinds need n tables and not n^2 formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.training.objectives.config import PredictionKind
from triptych.training.objectives.paths import EDMPath, Path


@dataclass(frozen=True)
class Prediction:
    """What is thought to be in x_t = alpha x0 + sigma noise, each shaped like x_t."""

    x0: Tensor
    noise: Tensor
    variance: Tensor | None = None
    """Of the reverse step, where it is learned: -1 stands for the smaller bound, 1 for the larger."""


class Linear(NamedTuple):
    """x0 = x0_x * x_t + x0_out * output; noise = noise_x * x_t + noise_out * output."""

    x0_x: Tensor
    x0_out: Tensor
    noise_x: Tensor
    noise_out: Tensor


def linear(kind: PredictionKind, path: Path, t: Tensor) -> Linear:
    """The coefficients at times t.

    Not finite where the output does not say enough: noise and score where alpha = 0, x0 and score where
    sigma = 0.
    """
    alpha, sigma, d_alpha, d_sigma = path.at(t)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    if kind == "velocity":
        determinant = alpha * d_sigma - d_alpha * sigma
        return Linear(
            d_sigma / determinant, -sigma / determinant, -d_alpha / determinant, alpha / determinant
        )
    if kind == "noise":
        return Linear(1 / alpha, -sigma / alpha, zero, one)
    if kind == "score":
        return Linear(1 / alpha, sigma.square() / alpha, zero, -sigma)
    if kind == "v":
        # The paper's path has length 1; with the length this inverts v = alpha noise - sigma x0 on any path.
        length = alpha.square() + sigma.square()
        return Linear(alpha / length, -sigma / length, sigma / length, alpha / length)
    if kind == "x0":
        return Linear(zero, one, 1 / sigma, -alpha / sigma)
    assert isinstance(path, EDMPath), f"{kind} on {type(path).__name__} is refused by ObjectiveConfig"
    # c_skip and c_out; the noise (x_t - x0) / sigma is written out, free of cancellation at small sigma.
    total = sigma.square() + path.sigma_data**2
    c_out = path.sigma_data * total.rsqrt()
    return Linear(path.sigma_data**2 / total, sigma * c_out, sigma / total, -c_out)


def from_output(kind: PredictionKind, path: Path, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
    """The prediction that `output` at x_t stands for. t broadcasts against x."""
    c = linear(kind, path, t)
    return Prediction(x0=c.x0_x * x + c.x0_out * output, noise=c.noise_x * x + c.noise_out * output)


def to_output(kind: PredictionKind, path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The output that stands for `x0` and `noise`: what a model is trained for. t broadcasts."""
    alpha, sigma, d_alpha, d_sigma = path.at(t)
    if kind == "velocity":
        return d_alpha * x0 + d_sigma * noise
    if kind == "noise":
        return noise.clone()
    if kind == "score":
        return -noise / sigma
    if kind == "v":
        return alpha * noise - sigma * x0
    if kind == "x0":
        return x0.clone()
    assert isinstance(path, EDMPath), f"{kind} on {type(path).__name__} is refused by ObjectiveConfig"
    data = path.sigma_data
    return (sigma * x0 - data**2 * noise) / (data * (sigma.square() + data**2).sqrt())


def velocity(path: Path, prediction: Prediction, t: Tensor) -> Tensor:
    """dx_t/dt of the probability flow."""
    return to_output("velocity", path, prediction.x0, prediction.noise, t)


def score(path: Path, prediction: Prediction, t: Tensor) -> Tensor:
    """The gradient of log p(x_t)."""
    return to_output("score", path, prediction.x0, prediction.noise, t)
