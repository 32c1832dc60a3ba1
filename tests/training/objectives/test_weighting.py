"""Weights against their papers, and against each other: they all weigh the error of x0."""

from __future__ import annotations

import pytest
import torch

from tests.training.objectives.batches import COMBINATIONS, normal, objective_config
from triptych.training.objectives.paths import EDMPath, build_path
from triptych.training.objectives.predictions import from_output, to_output
from triptych.training.objectives.weighting import edm_lambda, error_weight

TIMES = torch.tensor([0.002, 0.05, 0.3, 0.5, 0.77, 0.999], dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_min_snr_is_the_same_loss_whatever_is_predicted(name: str, kind: str) -> None:
    config = objective_config(name, kind, weighting="min_snr", min_snr_gamma=3.0)
    path = build_path(config)
    at = path.at(TIMES)
    x0, noise, wrong = normal(0, 6, 30), normal(1, 6, 30), normal(2, 6, 30)
    x = at.alpha * x0 + at.sigma * noise
    truth = to_output(kind, path, x0, noise, TIMES)
    error = wrong * (at.sigma if kind == "score" else 1.0)
    of_output = error_weight(config, path, TIMES) * error.square()
    snr = at.alpha**2 / at.sigma**2
    of_image = snr.clamp(max=3.0) * (from_output(kind, path, truth + wrong, x, TIMES).x0 - x0).square()
    torch.testing.assert_close(of_output, of_image, rtol=1e-6, atol=1e-9)


def test_min_snr_has_the_papers_forms() -> None:
    """arXiv 2303.09556, section 3.4, gamma 5."""
    for kind, divide in (("x0", lambda snr: 1.0), ("noise", lambda snr: snr), ("v", lambda snr: snr + 1)):
        config = objective_config("vp", kind, weighting="min_snr")
        path = build_path(config)
        snr = path.at(TIMES).alpha ** 2 / path.at(TIMES).sigma ** 2
        expected = snr.clamp(max=5.0) / divide(snr)
        torch.testing.assert_close(error_weight(config, path, TIMES), expected)


def test_min_snr_is_finite_where_training_times_end() -> None:
    for name, kind in COMBINATIONS:
        config = objective_config(name, kind, weighting="min_snr")
        path = build_path(config)
        ends = torch.tensor([1e-6, 1e4], dtype=torch.float64)
        if name != "edm":
            ends = path.snap(torch.tensor([1e-17, 1.0], dtype=torch.float64))
        assert bool(torch.isfinite(error_weight(config, path, ends)).all()), (name, kind)


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_without_weighting_all_times_weigh_the_same(name: str, kind: str) -> None:
    config = objective_config(name, kind)
    weight = error_weight(config, build_path(config), TIMES)
    torch.testing.assert_close(weight, torch.ones_like(weight))


def test_edm_weighs_the_image_by_lambda() -> None:
    path = EDMPath(sigma_data=0.5)
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    expected = [(s**2 + 0.25) / (s * 0.5) ** 2 for s in sigma.tolist()]
    assert edm_lambda(path, sigma).tolist() == pytest.approx(expected)
    # So the error of the preconditioned output, c_out times smaller, has weight 1.
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(edm_lambda(path, sigma) * c_out**2, torch.ones_like(sigma))
