"""The Frechet distance between Gaussians of features (FID; Heusel et al., arXiv 1706.08500), in float64."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F, F) of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    """Samples behind it; None where a file does not say."""

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise ValueError(
                f"a mean of shape {tuple(self.mean.shape)} and a covariance of shape "
                f"{tuple(self.covariance.shape)} are no Gaussian; shapes (F,) and (F, F) are"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("mean or covariance of the features is not finite; some feature was not")


@dataclass(frozen=True)
class Statistics:
    """A Gaussian out of a file, and the identity of the extractor of its features, where the file says so."""

    gaussian: Gaussian
    extractor: str | None


class Moments:
    """Mean and covariance of features, batch by batch (sums about the mean: Chan, Golub, LeVeque 1979)."""

    def __init__(self, feature_size: int) -> None:
        self.count = 0
        self._mean = torch.zeros(feature_size, dtype=torch.float64)
        self._scatter = torch.zeros(feature_size, feature_size, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in a batch (N, F), any float dtype and device."""
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(
                f"features of shape {tuple(features.shape)} do not fit; (N, {len(self._mean)}) does"
            )
        if not len(features):
            return
        batch = features.detach().to("cpu", torch.float64)
        mean = batch.mean(0)
        centred = batch - mean
        step, total = mean - self._mean, self.count + len(batch)
        self._scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(batch) / total)
        self._mean += step * (len(batch) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian with the unbiased covariance (division by N - 1, as every published FID)."""
        if self.count < 2:
            raise ValueError(f"{self.count} sample(s) have no covariance; give 2 or more")
        return Gaussian(self._mean.clone(), self._scatter / (self.count - 1), self.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^1/2), which is 0 for equal Gaussians.

    With C = L L^T from a symmetric eigen-decomposition, the last trace is the sum of the singular values of
    L1^T L2. No root of a product of matrices is taken, so singular covariances (fewer samples than features)
    lose no digits and need no jitter on the diagonal, where scipy's sqrtm loses half of them.
    Raises ValueError for different numbers of features and for a covariance with negative eigenvalues.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"{len(first.mean)} features cannot be compared with {len(second.mean)}; "
            "take both from the same extractor"
        )
    offset = first.mean - second.mean
    cross = torch.linalg.svdvals(_factor(first.covariance).T @ _factor(second.covariance)).sum()
    distance = offset @ offset + first.covariance.trace() + second.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """L (F, rank) with covariance = L L^T."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = float(values[-1])
    if float(values[0]) < -1e-6 * max(largest, 1e-300):
        raise ValueError(
            f"the covariance has the eigenvalue {float(values[0]):.3g} beside {largest:.3g}, "
            "so it is no covariance; make the statistics again"
        )
    # Smaller ones are the rounding of a zero.
    kept = values > largest * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def save_statistics(path: Path, gaussian: Gaussian, extractor: str) -> None:
    """Write `mu` and `sigma`, as ADM's reference files have them, the extractor and the number of samples."""
    with path.open("wb") as file:
        np.savez(
            file,
            mu=gaussian.mean.numpy(),
            sigma=gaussian.covariance.numpy(),
            count=np.int64(-1 if gaussian.count is None else gaussian.count),
            extractor=np.str_(extractor),
        )


def load_statistics(path: Path) -> Statistics | None:
    """The statistics in an .npz of ours or of ADM; None where it has no `mu`.

    Nothing is unpickled. Raises ValueError for a file that cannot be read or holds something else under the
    names.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file:
                return None
            if "sigma" not in file:
                raise ValueError("it has mu but no sigma")
            mean, covariance = (torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file else -1
            extractor = str(file["extractor"]) if "extractor" in file else None
            return Statistics(Gaussian(mean, covariance, count if count >= 0 else None), extractor)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as reference statistics: {error}; make it again") from error
