"""A denoiser that is known exactly: data ~ N(mean, std^2), independent elements, in any path and any kind.

E[x0 | x_t] = mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (x_t - alpha mean), and the probability flow
keeps (x_t - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.training.objectives.batches import model_config, objective_config
from triptych.training.objectives.paths import Coefficients, Path
from triptych.training.sampling import Denoiser

MEAN, STD = 0.3, 0.6


class Gaussian:
    """What a model trained to the end on such data would answer; counts how often it is asked.

    means: of each label, the last one without any; or one for all.
    """

    def __init__(self, path: str, kind: str, means: list[float] | float = MEAN, std: float = STD) -> None:
        self.objective = objective_config(path, kind)
        self.means = means
        self.std = std
        self.rows: list[int] = []
        self.times: list[float] = []
        self.denoiser = Denoiser(self.objective, model_config(), self.predict, dtype=torch.float64)
        self.path: Path = self.denoiser.path

    def predict(self, batch: dict[str, Any]) -> Tensor:
        """Outputs (B, 2, 8, 8) as the model's would be, from what a model is given."""
        name, times = self.objective.path, batch["times"]
        t = {"ddpm": (times + 1) / 1000, "edm": torch.exp(4 * times)}.get(name, times / 1000)
        self.rows.append(len(t))
        self.times.append(float(t[0]))
        t = t.view(-1, 1, 1, 1)
        x = batch["x"] * (t**2 + 0.25).sqrt() if name == "edm" else batch["x"]
        mean: Tensor | float = MEAN
        if isinstance(self.means, list):
            mean = torch.tensor(self.means, dtype=torch.float64)[batch["labels"]].view(-1, 1, 1, 1)
        else:
            mean = self.means
        at = self.path.at(t)
        x0 = mean + at.alpha * self.std**2 / self.variance(at) * (x - at.alpha * mean)
        noise = at.sigma / self.variance(at) * (x - at.alpha * mean)
        kind = self.objective.predict
        if kind == "velocity":
            return at.d_alpha * x0 + at.d_sigma * noise
        if kind == "v":
            return at.alpha * noise - at.sigma * x0
        if kind == "edm":
            return (t * x0 - 0.25 * noise) / (0.5 * (t**2 + 0.25).sqrt())
        return {"noise": noise, "x0": x0, "score": -noise / at.sigma}[kind]

    def variance(self, at: Coefficients) -> Tensor:
        """Of x_t."""
        return at.alpha**2 * self.std**2 + at.sigma**2

    def transported(self, x: Tensor, t: float, s: float, mean: float = MEAN) -> Tensor:
        """Where the probability flow takes x_t at time s."""
        at_t, at_s = self.at(t), self.at(s)
        scale = (self.variance(at_s) / self.variance(at_t)).sqrt()
        return at_s.alpha * mean + scale * (x - at_t.alpha * mean)

    def predicted(self, x: Tensor, t: float, mean: float = MEAN) -> Tensor:
        """The image that is thought to be in x_t."""
        at = self.at(t)
        return mean + at.alpha * self.std**2 / self.variance(at) * (x - at.alpha * mean)

    def at(self, t: float) -> Coefficients:
        return self.path.at(torch.tensor(t, dtype=torch.float64))


def observed_order(error: Callable[[int], float], steps: tuple[int, int]) -> float:
    """p of error ~ steps^-p between two numbers of steps."""
    few, many = steps
    return math.log(error(few) / error(many)) / math.log(many / few)
