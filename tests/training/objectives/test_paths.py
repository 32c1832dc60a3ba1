"""alpha, sigma and their derivatives against the papers' formulas, their ends, and Bayes' rule."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from tests.training.objectives.batches import objective_config
from triptych.training.objectives.paths import EDMPath, LinearPath, Path, build_path, posterior

PATHS = ("linear", "gvp", "vp", "ddpm", "edm")


def path_of(name: str) -> Path:
    return build_path(objective_config(name))


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_alpha_and_sigma_are_those_of_the_papers() -> None:
    for t in (0.1, 0.37, 0.5, 0.93):
        linear = path_of("linear").at(times(t))
        assert (float(linear.alpha), float(linear.sigma)) == (1 - t, t)
        gvp = path_of("gvp").at(times(t))
        assert float(gvp.alpha) == pytest.approx(math.cos(math.pi * t / 2), rel=1e-14)
        assert float(gvp.sigma) == pytest.approx(math.sin(math.pi * t / 2), rel=1e-14)
        # Song et al., appendix C: the integral of beta from 0 to t, by a sum over its linear pieces.
        grid = [t * (i + 0.5) / 1000 for i in range(1000)]
        integral = sum(0.1 + (20 - 0.1) * point for point in grid) * t / 1000
        vp = path_of("vp").at(times(t))
        assert float(vp.alpha) == pytest.approx(math.exp(-integral / 2), rel=1e-12)
        assert float(vp.sigma) == pytest.approx(math.sqrt(1 - math.exp(-integral)), rel=1e-12)
        edm = path_of("edm").at(times(t))
        assert (float(edm.alpha), float(edm.sigma)) == (1, t)


def test_ddpm_is_the_product_of_one_minus_beta() -> None:
    # Exact rational arithmetic; step k is t = (k + 1) / 1000.
    low, high = Fraction(1, 10_000), Fraction(2, 100)
    product = Fraction(1)
    for k in range(120):
        product *= 1 - (low + (high - low) * Fraction(k, 999))
        at = path_of("ddpm").at(times((k + 1) / 1000))
        assert float(at.alpha.square()) == pytest.approx(float(product), rel=1e-13)
        assert float(at.sigma.square()) == pytest.approx(float(1 - product), rel=1e-12)
    # What is left at the end is published with the schedule: alpha^2 = 4.0e-5.
    assert float(path_of("ddpm").at(times(1.0)).alpha.square()) == pytest.approx(4.04e-5, rel=2e-3)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_alpha_and_sigma(name: str) -> None:
    path = path_of(name)
    # Of ddpm on steps and between them.
    t = times(0.0153, 0.25, 0.5007, 0.777, 0.9904)
    step = 1e-6
    up, down, here = path.at(t + step), path.at(t - step), path.at(t)
    torch.testing.assert_close(here.d_alpha, (up.alpha - down.alpha) / (2 * step), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(here.d_sigma, (up.sigma - down.sigma) / (2 * step), rtol=1e-7, atol=1e-8)


def test_ddpm_is_nearly_the_continuous_path_of_its_betas() -> None:
    """A step of beta b is a thousandth of a time with beta 1000 b, which is vp's beta."""
    t = torch.linspace(0.0, 1.0, 501, dtype=torch.float64)
    discrete, continuous = path_of("ddpm").at(t), path_of("vp").at(t)
    slope, expected = discrete.d_alpha / discrete.alpha, continuous.d_alpha / continuous.alpha
    # log(1 - b) lies below -b by up to 1 %, at the noise; and steps begin at their beta, half a step early.
    torch.testing.assert_close(slope, expected, rtol=0.011, atol=19.9 / 4 / 1000)


@pytest.mark.parametrize("name", ["linear", "gvp", "vp", "ddpm"])
def test_the_ends_are_data_and_noise(name: str) -> None:
    start, end = path_of(name).at(times(0.0)), path_of(name).at(times(1.0))
    assert (float(start.alpha), float(start.sigma)) == (1, 0)
    assert float(end.sigma) == pytest.approx(1, abs=3e-5)
    assert float(end.alpha) == pytest.approx(0, abs=7e-3)
    if name in ("linear", "gvp"):
        assert (float(end.alpha), float(end.sigma)) == (0, 1)


def test_sigma_keeps_its_digits_at_the_data() -> None:
    # sigma^2 = integral of beta for small t; 1 - alpha^2 would have lost half of the digits.
    for t in (1e-5, 1e-8, 1e-11):
        sigma = float(path_of("vp").at(times(t)).sigma)
        assert sigma**2 == pytest.approx(0.1 * t + 9.95 * t * t, rel=1e-5 if t > 1e-6 else 1e-8)


def test_models_are_told_of_times_in_their_own_way() -> None:
    assert path_of("linear").embed(times(0.25)).tolist() == [250.0]
    k = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(path_of("ddpm").embed((k + 1) / 1000), k, rtol=0, atol=1e-9)
    assert path_of("edm").embed(times(math.exp(2.0))).tolist() == pytest.approx([0.5])


def test_draws_become_steps_of_ddpm() -> None:
    path = path_of("ddpm")
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert path.embed(path.snap(draws)).round().tolist() == list(range(1000))
    assert path.embed(path.snap(times(1e-17, 1.0))).tolist() == [0, 999]


def test_draws_stay_off_the_ends() -> None:
    assert path_of("linear").snap(times(0.0, 0.3, 1.0)).tolist() == [1e-12, 0.3, 1 - 1e-12]
    assert path_of("vp").snap(times(0.0)).tolist() == [1e-5]
    assert path_of("edm").snap(times(1e-4, 200.0)).tolist() == [1e-4, 200.0]


def test_edm_gives_its_model_inputs_of_unit_variance() -> None:
    path = EDMPath(sigma_data=0.5)
    sigma = times(0.01, 0.5, 40.0)
    variance = path.input_scale(sigma).square() * (0.5**2 + sigma.square())
    torch.testing.assert_close(variance, torch.ones_like(variance))
    assert LinearPath().input_scale(sigma).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", PATHS)
def test_posterior_is_bayes_rule(name: str) -> None:
    """The joint normal distribution of (x_s, x_t) given x0, conditioned on x_t by the general formula."""
    path = path_of(name)
    t, s = times(0.004, 0.3, 0.8, 1.0), times(0.001, 0.2, 0.3, 0.999)
    at_t, at_s = path.at(t), path.at(s)
    q = posterior(path, t, s)
    # x_t = ratio x_s + more noise, so the covariance of x_s and x_t is ratio sigma_s^2.
    ratio = at_t.alpha / at_s.alpha
    gain = ratio * at_s.sigma**2 / at_t.sigma**2
    torch.testing.assert_close(q.x, gain)
    torch.testing.assert_close(q.x0, at_s.alpha - gain * at_t.alpha)
    torch.testing.assert_close(q.variance, at_s.sigma**2 - gain * ratio * at_s.sigma**2, rtol=1e-9, atol=0)


def test_posterior_of_neighbouring_steps_is_ddpms() -> None:
    """arXiv 2006.11239, equations 6 and 7, with its betas."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    total = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), total[:-1]])
    knots = torch.arange(1, 1001, dtype=torch.float64) / 1000
    q = posterior(path_of("ddpm"), knots, knots - 1e-3)
    torch.testing.assert_close(q.largest, betas, rtol=1e-9, atol=0)
    torch.testing.assert_close(q.variance, (1 - before) / (1 - total) * betas, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(q.x0, before.sqrt() * betas / (1 - total), rtol=1e-9, atol=0)
    torch.testing.assert_close(q.x, (1 - betas).sqrt() * (1 - before) / (1 - total), rtol=1e-9, atol=1e-13)
