"""The variational bound against torch.distributions and against DDPM's formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.training.objectives.batches import normal
from triptych.training.objectives.paths import DDPMPath
from triptych.training.objectives.predictions import Prediction
from triptych.training.objectives.variational import (
    binned_log_likelihood,
    bound,
    log_variance,
    normal_divergence,
)


def test_divergence_of_normal_distributions() -> None:
    mean_q, mean_p, log_q, log_p = (normal(seed, 200) for seed in range(4))
    exact = kl_divergence(Normal(mean_q, (log_q / 2).exp()), Normal(mean_p, (log_p / 2).exp()))
    torch.testing.assert_close(normal_divergence(mean_q - mean_p, log_q, log_p), exact)


def test_bins_of_all_pixels_have_probability_one() -> None:
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64).unsqueeze(1)
    for mean, std in ((0.1, 0.2), (-0.97, 0.05), (3.0, 0.5), (0.0, 5.0)):
        log_std = torch.tensor(math.log(std), dtype=torch.float64)
        logs = binned_log_likelihood(pixels, torch.full((1, 1), mean, dtype=torch.float64), log_std)
        assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_bins_probability_is_a_difference_of_the_distribution_function() -> None:
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, std = torch.tensor([0.2, 0.3], dtype=torch.float64)
    normal_distribution = Normal(mean, std)
    upper, lower = (normal_distribution.cdf(pixels + shift) for shift in (1 / 255, -1 / 255))
    # The outermost bins reach on.
    upper[-1], lower[0] = 1.0, 0.0
    logs = binned_log_likelihood(pixels, mean, std.log())
    torch.testing.assert_close(logs, (upper - lower).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_bins_keep_their_digits_and_gradients(dtype: torch.dtype) -> None:
    """Twenty standard deviations off, where the difference itself underflows: density times width."""
    for sign in (-1, 1):
        x = torch.tensor(sign * 0.4, dtype=dtype)
        log_std = torch.tensor(math.log(0.02), dtype=dtype, requires_grad=True)
        value = binned_log_likelihood(x, torch.zeros((), dtype=dtype), log_std)
        value.backward()
        # The bin's near edge decides: z at 0.4 - 1/255, and the tail's expansion below it.
        z = (0.4 - 1 / 255) / 0.02
        expected = -(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)) - 1 / z**2
        assert value.item() == pytest.approx(expected, abs=2e-3)
        assert log_std.grad is not None and log_std.grad.item() == pytest.approx(z**2, rel=0.02)


def test_outermost_bins_have_gradients() -> None:
    """-1 and 1 of 8-bit pixels: log P(z < u) has slope -u phi(u) / P(z < u) by the logarithm of the width."""
    log_std = torch.tensor(math.log(0.4), dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    value = binned_log_likelihood(x, torch.tensor([-0.8, 1.3], dtype=torch.float64), log_std)
    u = torch.tensor([-0.2 + 1 / 255, 0.3 + 1 / 255], dtype=torch.float64) / 0.4
    standard = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    torch.testing.assert_close(value, standard.cdf(u).log())
    (slope,) = torch.autograd.grad(value.sum(), log_std)
    expected = (-u * standard.log_prob(u).exp() / standard.cdf(u)).sum()
    torch.testing.assert_close(slope, expected)


def test_output_of_one_is_the_larger_variance() -> None:
    small, large = torch.tensor(1e-4).log(), torch.tensor(2e-2).log()
    values = log_variance(torch.tensor([-1.0, 0.0, 1.0]), small, large).exp()
    assert values.tolist() == pytest.approx([1e-4, math.sqrt(1e-4 * 2e-2), 2e-2])


def ddpm_bound(k: int, x0: Tensor, noise: Tensor, noise_seen: Tensor, share: Tensor) -> Tensor:
    """L_k in bits as DDPM writes it: posterior mean and variance from betas, distributions from torch."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    total = torch.cumprod(1 - betas, 0)
    before = total[k - 1] if k else torch.tensor(1.0, dtype=torch.float64)
    x = total[k].sqrt() * x0 + (1 - total[k]).sqrt() * noise
    x0_seen = (x - (1 - total[k]).sqrt() * noise_seen) / total[k].sqrt()

    def mean(image: Tensor) -> Tensor:
        first = before.sqrt() * betas[k] / (1 - total[k]) * image
        return first + (1 - betas[k]).sqrt() * (1 - before) / (1 - total[k]) * x

    at = max(k, 1)
    tilde = (1 - total[at - 1]) / (1 - total[at]) * betas[at]
    variance = torch.exp(share * betas[k].log() + (1 - share) * tilde.log())
    p = Normal(mean(x0_seen), variance.sqrt())
    if k:
        return kl_divergence(Normal(mean(x0), tilde.sqrt().expand_as(x)), p) / math.log(2)
    probability = p.cdf(x0 + 1 / 255) - p.cdf(x0 - 1 / 255)
    return -probability.log() / math.log(2)


@pytest.mark.parametrize("k", [0, 1, 2, 500, 999])
def test_the_bound_is_ddpms(k: int) -> None:
    path = DDPMPath()
    x0 = normal(0, 50).clamp(-0.9, 0.9)
    noise, output = normal(1, 50), normal(3, 50)
    seen = noise + 0.3 * normal(2, 50)
    t = torch.full((50,), (k + 1) / 1000, dtype=torch.float64)
    at = path.at(t)
    x = at.alpha * x0 + at.sigma * noise
    prediction = Prediction((x - at.sigma * seen) / at.alpha, seen, output)
    expected = ddpm_bound(k, x0, noise, seen, (output + 1) / 2)
    torch.testing.assert_close(bound(path, x0, prediction, t), expected, rtol=1e-5, atol=1e-7)
    # And in float32, in which a model's outputs come.
    narrow = Prediction(prediction.x0.float(), seen.float(), output.float())
    torch.testing.assert_close(bound(path, x0.float(), narrow, t), expected.float(), rtol=3e-3, atol=3e-4)
