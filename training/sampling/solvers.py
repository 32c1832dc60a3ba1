"""One step from x_t to x_s, 0 < s < t, by each method, and the times between which each method steps.

Steps take (denoise, path, x, t, s, noise, config): denoise(x, t) is a Prediction, noise() standard normal
numbers like x. The last step, to t = 0, is the same for all: the image that is predicted. So no model is
evaluated where sigma = 0 and its output may say nothing of the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triptych.training.objectives.config import ObjectiveConfig
from triptych.training.objectives.paths import DDPMPath, EDMPath, Path, VPPath, posterior
from triptych.training.objectives.predictions import Prediction, score, velocity
from triptych.training.objectives.times import shifted
from triptych.training.objectives.variational import log_variance
from triptych.training.sampling.config import SamplerConfig

Denoise = Callable[[Tensor, float], Prediction]
Noise = Callable[[], Tensor]
Step = Callable[[Denoise, Path, Tensor, float, float, Noise, SamplerConfig], Tensor]

# Distance from an end at which a coefficient is infinite; SiT's.
_AWAY = 1e-3


def euler(
    denoise: Denoise, path: Path, x: Tensor, t: float, s: float, noise: Noise, config: SamplerConfig
) -> Tensor:
    """x + (s - t) dx/dt."""
    return x + (s - t) * _velocity(denoise, path, x, t)


def heun(
    denoise: Denoise, path: Path, x: Tensor, t: float, s: float, noise: Noise, config: SamplerConfig
) -> Tensor:
    """Euler's step, then again with the mean of the velocities at its two ends; two evaluations."""
    here = _velocity(denoise, path, x, t)
    there = _velocity(denoise, path, x + (s - t) * here, s)
    return x + (s - t) * (here + there) / 2


def ddim(
    denoise: Denoise, path: Path, x: Tensor, t: float, s: float, noise: Noise, config: SamplerConfig
) -> Tensor:
    """alpha_s x0 + sqrt(sigma_s^2 - z^2) noise + z fresh noise, z = eta times ddpm's standard deviation
    (arXiv 2010.02502, equation 12)."""
    seen = denoise(x, t)
    at_s = path.at(_scalar(s, x))
    variance = config.eta**2 * posterior(path, _scalar(t, x), _scalar(s, x)).variance
    stepped = at_s.alpha * seen.x0 + (at_s.sigma.square() - variance).clamp(min=0).sqrt() * seen.noise
    return stepped + variance.sqrt() * noise() if config.eta else stepped


def ddpm(
    denoise: Denoise, path: Path, x: Tensor, t: float, s: float, noise: Noise, config: SamplerConfig
) -> Tensor:
    """A draw from q(x_s | x_t, x0) at the predicted x0 (arXiv 2006.11239), or with the learned variance
    between its bounds (arXiv 2102.09672)."""
    seen = denoise(x, t)
    q = posterior(path, _scalar(t, x), _scalar(s, x))
    std = q.variance.sqrt()
    if seen.variance is not None:
        std = torch.exp(0.5 * log_variance(seen.variance, q.variance.log(), q.largest.log()))
    return q.x * x + q.x0 * seen.x0 + std * noise()


def sde(
    denoise: Denoise, path: Path, x: Tensor, t: float, s: float, noise: Noise, config: SamplerConfig
) -> Tensor:
    """Euler and Maruyama's step of dx = (velocity - w score) dt + sqrt(2 w) dW, back in time; it has the
    ODE's marginal distributions for any w >= 0 (arXiv 2401.08740, equation 7, where w is twice ours)."""
    seen, time = denoise(x, t), _scalar(t, x)
    alpha, sigma, d_alpha, d_sigma = path.at(time)
    choices = {
        "sigma": sigma,
        "sbdm": sigma * d_sigma - sigma.square() * d_alpha / alpha,
        "constant": torch.ones_like(sigma),
    }
    w = config.diffusion_scale * choices[config.diffusion]
    drift = velocity(path, seen, time) - w * score(path, seen, time)
    return x + (s - t) * drift + (2 * w * (t - s)).sqrt() * noise()


STEPS: dict[str, Step] = {"euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm, "sde": sde}


def step_times(config: SamplerConfig, objective: ObjectiveConfig, path: Path) -> list[float]:
    """Times of the steps, descending and above 0; the last step goes from the last of them to 0.

    edm: sigmas whose rho-th root falls evenly. ddpm: steps in equal distances, the last and the first among
    them. Otherwise evenly from 1 to 0; the SDE and path vp, where sigma' is infinite at 0, take their last
    step from somewhat further.
    """
    count = config.steps
    if isinstance(path, EDMPath):
        high, low = path.sigma_max ** (1 / config.rho), path.sigma_min ** (1 / config.rho)
        return [(high + (low - high) * part) ** config.rho for part in _parts(count)]
    if isinstance(path, DDPMPath):
        last = path.steps - 1
        return [(round(last * (1 - part)) + 1) / path.steps for part in _parts(count)]
    first = 1.0
    if objective.predict in ("noise", "score") or (config.method == "sde" and config.diffusion == "sbdm"):
        # alpha = 0 leaves x0 unknown, or w infinite.
        first = 1.0 if isinstance(path, VPPath) else 1 - _AWAY
    if config.method == "sde":
        times = [first + (config.last_step - first) * part for part in _parts(count)]
    elif isinstance(path, VPPath):
        times = [first + (_AWAY - first) * part for part in _parts(count)]
    else:
        times = [first * (1 - number / count) for number in range(count)]
    return shifted(torch.tensor(times, dtype=torch.float64), config.shift).tolist()


def _parts(count: int) -> list[float]:
    """0 to 1 in `count` points; 0 alone if that is one."""
    return [number / max(count - 1, 1) for number in range(count)]


def _velocity(denoise: Denoise, path: Path, x: Tensor, t: float) -> Tensor:
    return velocity(path, denoise(x, t), _scalar(t, x))


def _scalar(t: float, x: Tensor) -> Tensor:
    return torch.tensor(t, dtype=torch.float64, device=x.device)
