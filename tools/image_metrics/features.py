"""Extractors, which turn images into features and class probabilities, and one pass of one over a set."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from triptych.tools.image_metrics.fid import Gaussian, Moments
from triptych.tools.image_metrics.images import ImageSet

SECONDS_BETWEEN_LINES = 10.0


class Features(NamedTuple):
    """What an extractor makes of N images, float32 on its device."""

    features: Tensor  # (N, F)
    probabilities: Tensor  # (N, K), rows sum to 1


class Extractor(Protocol):
    """A fixed function of images. Two numbers can be compared only where `identity` is the same."""

    @property
    def name(self) -> str:
        """In a word or two, for people."""

    @property
    def identity(self) -> str:
        """Changes whenever weights or treatment of the images do."""

    @property
    def feature_size(self) -> int:
        """F."""

    @property
    def knows_labels(self) -> bool:
        """Whether its classes are the labels of the data, so that a sample can be recognised as its label."""

    @property
    def reads_adm_statistics(self) -> bool:
        """Whether statistics of files that name no extractor, as ADM's, are of its features."""

    def conditions(self) -> dict[str, Any]:
        """What its numbers depend on, as JSON values: weights and their hash, resizing, accuracy."""

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Raise ValueError where images of the set `name`, of shape (H, W, C), cannot be judged."""

    def extract(self, images: np.ndarray) -> Features:
        """images: uint8 (N, H, W, C)."""


@dataclass(frozen=True)
class Measured:
    """One set seen through one extractor."""

    count: int
    gaussian: Gaussian | None
    """None for a single image."""
    features: Tensor
    """(M, F) float32 on the extractor's device: of all images, or of `keep` of them drawn evenly."""
    probabilities: Tensor
    """(count, K) float32 on the CPU."""
    pixels_sha256: str

    def recognised(self, labels: np.ndarray) -> np.ndarray:
        """(count,) bool: whether the likeliest class is the label. Raises ValueError for an unknown label."""
        classes = self.probabilities.shape[1]
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"label {int(labels.max() if labels.max() >= classes else labels.min())} is none of the "
                f"extractor's classes 0 to {classes - 1}; take an extractor trained on the same classes"
            )
        return self.probabilities.argmax(1).numpy() == labels


def measure(
    images: ImageSet,
    extractor: Extractor,
    *,
    batch_size: int = 128,
    keep: int = 50_000,
    progress: Callable[[str], None] | None = None,
) -> Measured:
    """Run `extractor` once over `images`.

    keep: features held in memory at most; a larger set is thinned by a fixed draw (mean and covariance are of
    all images nevertheless). Raises ValueError where the images do not suit the extractor or cannot be read.
    """
    extractor.check(images.name, images.shape)
    moments, digest = Moments(extractor.feature_size), hashlib.sha256(repr(images.shape).encode())
    kept = _draw(images.count, keep)
    features: list[Tensor] = []
    probabilities: list[Tensor] = []
    done, told = 0, time.monotonic()
    for batch in images.batches(batch_size):
        digest.update(np.ascontiguousarray(batch).data)
        found = extractor.extract(batch)
        moments.add(found.features)
        features.append(found.features[kept[done : done + len(batch)].to(found.features.device)])
        probabilities.append(found.probabilities.cpu())
        done += len(batch)
        if progress and time.monotonic() > told + SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            progress(f"{images.name}: {done} of {images.count} images")
    return Measured(
        count=done,
        gaussian=moments.gaussian() if done > 1 else None,
        features=torch.cat(features),
        probabilities=torch.cat(probabilities),
        pixels_sha256=digest.hexdigest(),
    )


def _draw(count: int, keep: int) -> Tensor:
    """(count,) bool with min(count, keep) ones. Random: every tenth sample may be of one class."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:keep]] = True
    return chosen


def to_float(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W), still 0 to 255."""
    # Arrays read from files are read-only, which torch warns of.
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
