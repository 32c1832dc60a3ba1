"""Weights of the squared error, by time and by what is predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.training.objectives.config import ObjectiveConfig
from triptych.training.objectives.paths import EDMPath, Path
from triptych.training.objectives.predictions import linear

GAMMA = 5.0
"""min-SNR's gamma where none is said, the paper's."""


def error_weight(config: ObjectiveConfig, path: Path, t: Tensor) -> Tensor:
    """Factor (float64, shaped like t) on the squared error of what is predicted; for score, of sigma * score,
    which is minus the noise."""
    if config.weighting == "min_snr":
        return min_snr(config, path, t)
    if isinstance(path, EDMPath):
        return edm_lambda(path, t) * linear("edm", path, t).x0_out.square()
    return torch.ones_like(t)


def min_snr(config: ObjectiveConfig, path: Path, t: Tensor) -> Tensor:
    """min(SNR, gamma) on the squared error of x0, as a factor on that of what is predicted (arXiv
    2303.09556).

    With SNR = alpha^2 / sigma^2 it is min(SNR, gamma) for x0, min(SNR, gamma) / SNR for noise and
    min(SNR, gamma) / (SNR + 1) for v on a path of alpha^2 + sigma^2 = 1; for the others it follows from how
    x0 depends on the output.
    """
    gamma = GAMMA if config.min_snr_gamma is None else config.min_snr_gamma
    at = path.at(t)
    snr = at.alpha.square() / at.sigma.square()
    kind = "noise" if config.predict == "score" else config.predict
    return snr.clamp(max=gamma) * linear(kind, path, t).x0_out.square()


def edm_lambda(path: EDMPath, t: Tensor) -> Tensor:
    """EDM's weight of the squared error of x0 (arXiv 2206.00364, table 1); 1 / c_out^2, so that the error of
    the preconditioned output has weight 1."""
    return (t.square() + path.sigma_data**2) / (t * path.sigma_data).square()
