"""The variational bound that trains a learned variance (Nichol and Dhariwal, arXiv 2102.09672).

p(x_s | x_t) is normal with the mean of q(x_s | x_t, x0) at the predicted x0 and the variance
exp(f log beta + (1 - f) log beta~), f = (output + 1) / 2: between those of Posterior.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triptych.training.objectives.paths import DDPMPath, posterior
from triptych.training.objectives.predictions import Prediction

# 8-bit pixels in [-1, 1] are 2/255 apart.
_HALF_BIN = 1 / 255
_OUTERMOST = 0.999


def log_variance(output: Tensor, log_smallest: Tensor, log_largest: Tensor) -> Tensor:
    """Logarithm of the variance that an output means, -1 for the smaller bound and 1 for the larger."""
    share = (output + 1) / 2
    return share * log_largest + (1 - share) * log_smallest


def bound(path: DDPMPath, x0: Tensor, prediction: Prediction, t: Tensor) -> Tensor:
    """The bound's term of each element's step, in bits; elementwise, in the dtype of x0.

    At step 0 -log p(x0 | x_1) with x0 in bins of 8 bits, at the others KL(q(x_s | x_t, x0) || p(x_s | x_t)).
    x0: the image. prediction: with its variance. t: times of steps (float64), broadcastable.
    """
    assert prediction.variance is not None, "the bound trains a variance"
    step = 1 / path.steps
    q = posterior(path, t, t - step)
    # q is a point at step 0; the paper takes step 1's variance for its bound.
    floor = posterior(path, t.clamp(min=2 * step), t.clamp(min=2 * step) - step).variance
    log_floor = floor.log().to(x0.dtype)
    log_p = log_variance(prediction.variance, log_floor, q.largest.log().to(x0.dtype))
    # The coefficients of x_t are the same in both means.
    difference = q.x0.to(x0.dtype) * (x0 - prediction.x0)
    divergence = normal_divergence(difference, log_floor, log_p)
    first = t < 1.5 * step
    # The mean at step 0 is x0 itself. Elsewhere the likelihood is not taken, and must not overflow either.
    likelihood = binned_log_likelihood(x0, torch.where(first, prediction.x0, x0), log_p / 2)
    return torch.where(first, -likelihood, divergence) / math.log(2)


def normal_divergence(difference: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) in nats of two normal distributions whose means differ by `difference`."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (ratio.exp() - 1 - ratio + difference.square() * (-log_variance_p).exp())


def binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of a normal distribution's probability of the 8-bit bin around x; the outermost bins reach on to
    infinity (arXiv 2006.11239, equation 13).

    Exact, where the reference codes approximate the distribution function by a tanh.
    """
    scale = (-log_std).exp()
    upper = torch.where(x > _OUTERMOST, math.inf, (x - mean + _HALF_BIN) * scale)
    lower = torch.where(x < -_OUTERMOST, -math.inf, (x - mean - _HALF_BIN) * scale)
    # P(lower < z < upper) = P(-upper < z < -lower); below 0 the logarithms keep their digits.
    flip = lower > 0
    log_high = torch.special.log_ndtr(torch.where(flip, -lower, upper))
    log_low = torch.special.log_ndtr(torch.where(flip, -upper, lower))
    return log_high + torch.log(-torch.expm1(log_low - log_high))
