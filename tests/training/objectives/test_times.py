"""Distributions of training times, by the Kolmogorov-Smirnov statistic of many keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.objectives.batches import keys, kolmogorov_smirnov, objective_config
from triptych.training.objectives.config import TimesConfig
from triptych.training.objectives.paths import build_path
from triptych.training.objectives.times import draw_times, shifted, times_of

COUNT = 20_000
CRITICAL = 1.95


def drawn(path: str = "linear", **times: Any) -> Tensor:
    config = objective_config(path, times=times)
    return draw_times(config.times, build_path(config), keys(COUNT))


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def test_uniform() -> None:
    t = drawn()
    assert kolmogorov_smirnov(t, t) < CRITICAL


@pytest.mark.parametrize(("mean", "std"), [(None, None), (-0.8, 0.6), (1.0, 2.0)])
def test_logit_normal(mean: float | None, std: float | None) -> None:
    t = drawn(kind="logit_normal", mean=mean, std=std)
    z = (torch.log(t / (1 - t)) - (mean or 0.0)) / (std or 1.0)
    assert kolmogorov_smirnov(t, normal_cdf(z)) < CRITICAL
    # The same as another distribution would not pass.
    assert kolmogorov_smirnov(t, normal_cdf(z + 0.1)) > CRITICAL


@pytest.mark.parametrize("scale", [None, -1.0, -0.5, 0.8, 1.75])
def test_mode(scale: float | None) -> None:
    """arXiv 2403.03206, equation 20, whose inverse is found by bisection: P(f(u) <= t) = 1 - f^-1(t)."""
    t = drawn(kind="mode", scale=scale)
    s = 1.29 if scale is None else scale
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        value = 1 - middle - s * (torch.cos(math.pi / 2 * middle) ** 2 - 1 + middle)
        low, high = torch.where(value > t, middle, low), torch.where(value > t, high, middle)
    assert kolmogorov_smirnov(t, 1 - low) < CRITICAL
    if s:
        assert kolmogorov_smirnov(t, t) > CRITICAL


@pytest.mark.parametrize(("mean", "std"), [(None, None), (-0.4, 1.0)])
def test_edm(mean: float | None, std: float | None) -> None:
    sigma = drawn("edm", mean=mean, std=std)
    z = (sigma.log() - (-1.2 if mean is None else mean)) / (std or 1.2)
    assert kolmogorov_smirnov(sigma, normal_cdf(z)) < CRITICAL


def test_shift_moves_times_towards_the_noise() -> None:
    t = drawn(shift=3.0)
    unshifted = t / (3 - 2 * t)
    assert kolmogorov_smirnov(t, unshifted) < CRITICAL
    assert float(t.mean()) > 0.6
    assert shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]


def test_shift_is_that_of_the_signal_to_noise_ratio() -> None:
    # arXiv 2403.03206, equation 23: sigma / alpha grows by the factor.
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = shifted(t, 2.5)
    torch.testing.assert_close(moved / (1 - moved), 2.5 * t / (1 - t))


def test_every_step_of_ddpm_is_as_likely() -> None:
    path = build_path(objective_config("ddpm"))
    counts = torch.bincount(path.embed(drawn("ddpm")).round().long(), minlength=1000).double()
    assert len(counts) == 1000
    # Chi-square with 999 degrees of freedom: mean 999, standard deviation 45.
    assert float(((counts - COUNT / 1000) ** 2 / (COUNT / 1000)).sum()) < 999 + 4 * 45


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode", "edm"])
def test_times_follow_the_uniform_number_without_a_turn(kind: str) -> None:
    u = torch.linspace(1e-6, 1 - 1e-6, 5001, dtype=torch.float64)
    steps = times_of(TimesConfig(kind=kind), u).diff()
    assert bool((steps > 0).all()) or bool((steps < 0).all())


def test_a_time_belongs_to_its_key() -> None:
    config = objective_config()
    path = build_path(config)
    many = keys(12)
    together = draw_times(config.times, path, many.view(3, 4))
    for number, key in enumerate(many):
        alone = draw_times(config.times, path, key.view(1))
        assert float(alone) == float(together.flatten()[number])
