"""Scores of features and class probabilities: inception-like score, improved precision and recall."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al., 1606.03498).

    probabilities: (N, K), rows sum to 1. Between 1 (every image is judged alike) and K.
    The order is shuffled by `seed` before it is split: samples that are sorted by class, as some samplers
    write them, would have a few classes in each split and a score that is too low.
    Raises ValueError for fewer images than splits, or rows that are no distribution.
    """
    count = len(probabilities)
    if splits < 1 or count < splits:
        raise ValueError(f"splits={splits} does not cut {count} images; use 1 to {max(count, 1)} splits")
    p = probabilities.to("cpu", torch.float64)
    if not ((p >= 0).all() and torch.allclose(p.sum(1), torch.ones(count, dtype=torch.float64), atol=1e-4)):
        raise ValueError("probabilities must be non-negative and sum to 1 in each row")
    shuffled = p[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    scores = torch.stack([_score(part) for part in shuffled.tensor_split(splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(p: Tensor) -> Tensor:
    """exp of the mutual information of image and class; 0 log 0 is 0."""
    marginal = p.mean(0)
    return (torch.xlogy(p, p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()).exp()


def precision_recall(
    reference: Tensor, samples: Tensor, neighbours: int = 3, chunk: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), distances in float64.

    reference: (N, F), samples: (M, F). A set's manifold is the union of balls around its points, each as
    large as the distance to the point's k-th nearest other point, k = `neighbours`. Precision is the share of
    samples in the manifold of the reference, recall the share of reference points in the manifold of the
    samples.
    chunk: rows at a time; it changes memory, no result.
    Raises ValueError where a set has no k-th neighbour.
    """
    for name, points in (("reference", reference), ("samples", samples)):
        if len(points) <= neighbours:
            raise ValueError(
                f"{len(points)} {name} have no neighbour number {neighbours}; "
                f"give {neighbours + 1} images or more"
            )
    # Distances do not change with the origin, but their rounding does.
    origin = reference.double().mean(0)
    reference, samples = reference.double() - origin, samples.double() - origin
    precision = _share_inside(samples, reference, _squared_radii(reference, neighbours, chunk), chunk)
    recall = _share_inside(reference, samples, _squared_radii(samples, neighbours, chunk), chunk)
    return precision, recall


def _squared_radii(points: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Squared distance from each point to its k-th nearest other one, (N,)."""
    radii = []
    for first, distances in _squared_distances(points, points, chunk):
        rows = torch.arange(len(distances), device=points.device)
        distances[rows, first + rows] = torch.inf
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, squared_radii: Tensor, chunk: int) -> float:
    inside = sum(
        int((distances <= squared_radii).any(1).sum())
        for _, distances in _squared_distances(points, centres, chunk)
    )
    return inside / len(points)


def _squared_distances(points: Tensor, others: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances (rows, M)) for each chunk of rows of `points`."""
    size = others.square().sum(1)
    rounding = 4 * points.shape[1] * torch.finfo(torch.float64).eps
    for first in range(0, len(points), chunk):
        rows = points[first : first + chunk]
        scale = rows.square().sum(1, keepdim=True) + size
        distances = scale - 2 * rows @ others.T
        # Equal points are 0 apart, not what is left of the cancellation: a ball of radius 0 holds its own
        # centre.
        yield first, torch.where(distances > rounding * scale, distances, 0.0)
