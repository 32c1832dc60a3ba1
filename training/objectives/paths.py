"""Probability paths between data and noise, and the one convention of time.

t = 0 is the data and t = 1 is the noise: x_t = alpha(t) x0 + sigma(t) noise, alpha falls and sigma rises. The
velocity is dx_t/dt = alpha' x0 + sigma' noise, for the linear path noise - x0. Where others count otherwise,
it is converted at the edge:

- DDPM's step k of K (k = 0 .. K - 1) is t = (k + 1) / K, so that t = 0 is the image itself.
- EDM's t is sigma, in [sigma_min, sigma_max] and 0.
- SiT has its data at 1; its t is 1 - t here, and its velocity is the negative of ours.
- A model is told `embed(t)`: 1000 t, DDPM's k, or EDM's ln(sigma) / 4.

All times are float64; every function here is elementwise in them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.training.objectives.config import ObjectiveConfig

# Times of training stay this far from the ends, where some conversion divides by zero.
MARGIN = 1e-12


class Coefficients(NamedTuple):
    """alpha(t), sigma(t) and their derivatives by t, shaped like t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Path(ABC):
    """alpha and sigma as functions of t, and what a model is told of t."""

    lowest: float = MARGIN
    highest: float = 1 - MARGIN
    """Times of training are between these."""

    @abstractmethod
    def at(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their derivatives at t (float64)."""

    def embed(self, t: Tensor) -> Tensor:
        """What the model's embedding of time is given."""
        return 1000.0 * t

    def snap(self, t: Tensor) -> Tensor:
        """The time of this path that a draw t in (0, 1) stands for."""
        return t.clamp(self.lowest, self.highest)

    def input_scale(self, t: Tensor) -> Tensor:
        """Factor on x_t before it enters the model."""
        return torch.ones_like(t)


class LinearPath(Path):
    """alpha = 1 - t, sigma = t: flow matching (arXiv 2210.02747) and rectified flow (arXiv 2209.03003)."""

    def at(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)


class GVPPath(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the trigonometric interpolant (arXiv 2209.15571)."""

    def at(self, t: Tensor) -> Coefficients:
        # cos(pi t / 2) as a sine, which is exactly 0 at t = 1.
        alpha = torch.sin(math.pi / 2 * (1 - t))
        sigma = torch.sin(math.pi / 2 * t)
        return Coefficients(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)


class VPPath(Path):
    """The variance-preserving SDE with beta(t) from 0.1 to 20 (arXiv 2011.13456): alpha^2 + sigma^2 = 1.

    sigma' is infinite at t = 0; training stays 1e-5 away, as SiT does.
    """

    lowest = 1e-5

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min = beta_min
        self.beta_max = beta_max

    def at(self, t: Tensor) -> Coefficients:
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        integral = t * self.beta_min + t.square() * ((self.beta_max - self.beta_min) / 2)
        return _variance_preserving(-integral / 2, -beta / 2)


class DDPMPath(Path):
    """K discrete steps with betas in equal distances (arXiv 2006.11239); alpha^2 = prod (1 - beta).

    For ODE solvers alpha and sigma are smooth between the steps, too: the logarithm of alpha is a cubic
    spline (Hermite) through its values at the steps, with the mean of the slopes on both sides. Training
    stays on the steps.
    """

    def __init__(self, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 2e-2) -> None:
        self.steps = steps
        slopes = torch.log1p(-torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)) / 2
        values = torch.cat([torch.zeros(1, dtype=torch.float64), slopes.cumsum(0)])
        padded = torch.cat([2 * slopes[:1] - slopes[1:2], slopes, 2 * slopes[-1:] - slopes[-2:-1]])
        self._tables = {torch.device("cpu"): (values, (padded[1:] + padded[:-1]) / 2)}

    def at(self, t: Tensor) -> Coefficients:
        place = t * self.steps
        left = place.floor().clamp(0, self.steps - 1)
        f, k = place - left, left.long()
        values, slopes = self._on(t.device)
        rise, first, last = values[k + 1] - values[k], slopes[k], slopes[k + 1]
        # v + f first + f^2 (3 rise - 2 first - last) + f^3 (first + last - 2 rise) and its derivative.
        square, cube = 3 * rise - 2 * first - last, first + last - 2 * rise
        log_alpha = values[k] + f * (first + f * (square + f * cube))
        return _variance_preserving(log_alpha, self.steps * (first + f * (2 * square + 3 * f * cube)))

    def embed(self, t: Tensor) -> Tensor:
        return t * self.steps - 1

    def snap(self, t: Tensor) -> Tensor:
        return ((t * self.steps).floor().clamp(0, self.steps - 1) + 1) / self.steps

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """log alpha and its slopes, per step, at t = 0, 1 / K, ..., 1."""
        if device not in self._tables:
            values, slopes = self._tables[torch.device("cpu")]
            self._tables[device] = (values.to(device), slopes.to(device))
        return self._tables[device]


class EDMPath(Path):
    """alpha = 1, sigma = t (arXiv 2206.00364), with the preconditioning of its table 1.

    Times of training are not bounded by sigma_min and sigma_max, which are those of sampling.
    """

    lowest = 0.0
    highest = math.inf

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def at(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(one, t, torch.zeros_like(t), one)

    def embed(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in, which gives the input unit variance."""
        return (t.square() + self.sigma_data**2).rsqrt()


class Posterior(NamedTuple):
    """q(x_s | x_t, x0), a normal distribution of mean x * x_t + x0 * x0, and the variances between which a
    learned one lies."""

    x: Tensor
    x0: Tensor
    variance: Tensor
    """Of q: what the reverse step needs if x0 is known (DDPM's beta tilde)."""
    largest: Tensor
    """Of q(x_t | x_s): what it needs if x0 has unit variance (DDPM's beta)."""


def posterior(path: Path, t: Tensor, s: Tensor) -> Posterior:
    """The step back from t to s < t, by Bayes' rule, on any path (arXiv 2107.00630, appendix A)."""
    at_t, at_s = path.at(t), path.at(s)
    ratio = at_t.alpha / at_s.alpha
    added = at_t.sigma.square() - ratio.square() * at_s.sigma.square()
    share = at_s.sigma.square() / at_t.sigma.square()
    return Posterior(ratio * share, at_s.alpha * added / at_t.sigma.square(), added * share, added)


def build_path(config: ObjectiveConfig) -> Path:
    """The path that train.objective names."""
    if config.path == "edm":
        return EDMPath(config.edm.sigma_data, config.edm.sigma_min, config.edm.sigma_max)
    return {"linear": LinearPath, "gvp": GVPPath, "vp": VPPath, "ddpm": DDPMPath}[config.path]()


def _variance_preserving(log_alpha: Tensor, d_log_alpha: Tensor) -> Coefficients:
    """alpha and sigma with alpha^2 + sigma^2 = 1; sigma without cancellation where it is small."""
    alpha = log_alpha.exp()
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    return Coefficients(alpha, sigma, alpha * d_log_alpha, -alpha.square() * d_log_alpha / sigma)
