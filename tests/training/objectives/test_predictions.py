"""Conversions among kinds of output, against definitions and against each other, up to the ends."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.objectives.batches import COMBINATIONS, normal, objective_config
from triptych.training.objectives.paths import Path, build_path
from triptych.training.objectives.predictions import from_output, score, to_output, velocity

TIMES = torch.tensor([0.002, 0.03, 0.3, 0.5, 0.77, 0.999], dtype=torch.float64).unsqueeze(1)
X0, NOISE = normal(0, 6, 40), normal(1, 6, 40)


def noised(path: Path, t: torch.Tensor) -> torch.Tensor:
    at = path.at(t)
    return at.alpha * X0 + at.sigma * NOISE


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_what_is_in_an_output_comes_out_of_it(name: str, kind: str) -> None:
    path = build_path(objective_config(name, kind))
    x = noised(path, TIMES)
    seen = from_output(kind, path, to_output(kind, path, X0, NOISE, TIMES), x, TIMES)
    # Near an end one of the two is a difference of large numbers, as it must be.
    torch.testing.assert_close(seen.x0, X0, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(seen.noise, NOISE, rtol=1e-9, atol=1e-10)
    assert seen.variance is None


def test_definitions_of_the_kinds() -> None:
    path, t = build_path(objective_config("vp")), TIMES
    at = path.at(t)
    torch.testing.assert_close(to_output("noise", path, X0, NOISE, t), NOISE)
    torch.testing.assert_close(to_output("x0", path, X0, NOISE, t), X0)
    torch.testing.assert_close(to_output("v", path, X0, NOISE, t), at.alpha * NOISE - at.sigma * X0)
    step = 1e-7
    moved = path.at(t + step)
    slope = ((moved.alpha - at.alpha) * X0 + (moved.sigma - at.sigma) * NOISE) / step
    torch.testing.assert_close(to_output("velocity", path, X0, NOISE, t), slope, rtol=1e-3, atol=1e-4)
    # The gradient of log N(x; alpha x0, sigma^2) by x.
    x = noised(path, t).requires_grad_()
    log_density = -0.5 * ((x - at.alpha * X0) / at.sigma).square().sum()
    (gradient,) = torch.autograd.grad(log_density, x)
    torch.testing.assert_close(to_output("score", path, X0, NOISE, t), gradient, rtol=1e-7, atol=1e-7)


def test_velocity_of_the_linear_path_points_from_data_to_noise() -> None:
    path = build_path(objective_config("linear"))
    torch.testing.assert_close(to_output("velocity", path, X0, NOISE, TIMES), NOISE - X0)


@pytest.mark.parametrize("name", ["linear", "gvp"])
def test_velocity_and_v_say_all_at_both_ends(name: str) -> None:
    path = build_path(objective_config(name))
    for t in (0.0, 1.0):
        time = torch.full((6, 1), t, dtype=torch.float64)
        for kind in ("velocity", "v"):
            seen = from_output(kind, path, to_output(kind, path, X0, NOISE, time), noised(path, time), time)
            torch.testing.assert_close(seen.x0, X0)
            torch.testing.assert_close(seen.noise, NOISE)


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
def test_velocity_and_score_are_related_as_in_sit(name: str) -> None:
    """arXiv 2401.08740, equation 9, at our t: score = (alpha v - alpha' x) / (sigma (alpha' sigma - alpha
    sigma'))."""
    path = build_path(objective_config(name))
    at, x = path.at(TIMES), noised(path, TIMES)
    output = normal(3, 6, 40)
    seen = from_output("velocity", path, output, x, TIMES)
    expected = (at.alpha * output - at.d_alpha * x) / (
        at.sigma * (at.d_alpha * at.sigma - at.alpha * at.d_sigma)
    )
    torch.testing.assert_close(score(path, seen, TIMES), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(velocity(path, seen, TIMES), output, rtol=1e-9, atol=1e-9)


def test_edm_is_its_papers_preconditioning() -> None:
    """D(x) = c_skip x + c_out F and the target of F, arXiv 2206.00364, equations 7 and 8."""
    path = build_path(objective_config("edm"))
    for sigma in (0.002, 0.5, 3.0, 80.0):
        t = torch.tensor(sigma, dtype=torch.float64)
        c_skip = 0.25 / (sigma**2 + 0.25)
        c_out = sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        x, output = X0 + sigma * NOISE, normal(4, 6, 40)
        seen = from_output("edm", path, output, x, t)
        torch.testing.assert_close(seen.x0, c_skip * x + c_out * output)
        torch.testing.assert_close(seen.noise, (x - seen.x0) / sigma, rtol=1e-6, atol=1e-10)
        target = (X0 - c_skip * x) / c_out
        torch.testing.assert_close(to_output("edm", path, X0, NOISE, t), target, rtol=1e-8, atol=1e-8)


def test_edms_targets_have_unit_variance() -> None:
    path = build_path(objective_config("edm"))
    x0, noise = 0.5 * normal(5, 200_000), normal(6, 200_000)
    for sigma in (0.002, 0.4, 80.0):
        target = to_output("edm", path, x0, noise, torch.tensor(sigma, dtype=torch.float64))
        assert float(target.var()) == pytest.approx(1, abs=0.01)
