"""The scores against cases worked out by hand and a direct double loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from triptych.tools.image_metrics.scores import inception_score, precision_recall


def one_hot(labels: list[int], classes: int) -> Tensor:
    return torch.eye(classes, dtype=torch.float64)[torch.tensor(labels)]


def test_score_is_the_number_of_classes_when_each_is_certain_and_all_are_drawn() -> None:
    assert inception_score(one_hot([0, 1, 2, 3] * 5, 4), splits=1) == (pytest.approx(4.0, rel=1e-13), 0.0)
    # Only two of the four are ever drawn.
    assert inception_score(one_hot([0, 3] * 5, 4), splits=1)[0] == pytest.approx(2.0, rel=1e-13)


def test_score_is_one_when_every_image_is_judged_alike() -> None:
    assert inception_score(torch.full((12, 3), 1 / 3), splits=3)[0] == pytest.approx(1.0, rel=1e-6)
    assert inception_score(one_hot([2] * 12, 3), splits=3) == (pytest.approx(1.0, rel=1e-13), 0.0)


def test_score_by_hand() -> None:
    # Rows (3/4, 1/4) and (1/4, 3/4): the marginal is (1/2, 1/2), the divergence 3/4 ln 3/2 + 1/4 ln 1/2.
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert inception_score(p, splits=1)[0] == pytest.approx(expected, rel=1e-13)
    # Unequal shares: marginal (2/3, 1/3) of three certain images.
    marginal = math.exp(2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3))
    assert inception_score(one_hot([0, 0, 1], 2), splits=1)[0] == pytest.approx(marginal, rel=1e-13)


def test_splits_are_drawn_from_all_over_the_set() -> None:
    # Sorted by class: a split of neighbours would hold one class and score 1.
    p = one_hot([label for label in range(10) for _ in range(100)], 10)
    mean, spread = inception_score(p, splits=10)
    assert 9 < mean < 10
    assert 0 < spread < 0.5
    # One image a split is judged like itself.
    assert inception_score(p, splits=1000) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))


def test_score_refuses_what_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="splits=3 does not cut 2 images"):
        inception_score(one_hot([0, 1], 2), splits=3)
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(torch.ones(4, 2), splits=1)
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(torch.tensor([[1.5, -0.5]]), splits=1)
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(torch.tensor([[math.nan, 1.0]]), splits=1)


def by_definition(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    def inside(points: Tensor, centres: Tensor) -> float:
        count = 0
        for point in points:
            for number, centre in enumerate(centres):
                others = [math.dist(centre, other) for i, other in enumerate(centres) if i != number]
                if math.dist(point, centre) <= sorted(others)[k - 1]:
                    count += 1
                    break
        return count / len(points)

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_precision_and_recall_by_their_definition(k: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(k)
    reference = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    samples = 1.5 * torch.randn(31, 3, generator=generator, dtype=torch.float64) + 1.5
    expected = by_definition(reference, samples, k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(reference, samples, k, chunk) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_identical_sets_are_inside_each_other(offset: float) -> None:
    points = offset + torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert precision_recall(points, points.clone()) == (1.0, 1.0)


def test_sets_of_repeated_points() -> None:
    # Every ball has the radius 0 and holds its centre only, whatever is left of the rounding.
    points = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).repeat_interleave(5, 0) + 100
    assert precision_recall(points, points.clone()) == (1.0, 1.0)
    assert precision_recall(points, points + 1e-3) == (0.0, 0.0)


def test_disjoint_sets_share_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    assert precision_recall(
        torch.rand(30, 4, generator=generator), 9 + torch.rand(30, 4, generator=generator)
    ) == (
        0.0,
        0.0,
    )


def test_a_dropped_mode_costs_recall_and_a_strange_one_precision() -> None:
    generator = torch.Generator().manual_seed(4)
    modes = [torch.rand(40, 2, generator=generator) + 10 * number for number in range(4)]
    whole, half = torch.cat(modes), torch.cat(modes[:2])
    precision, recall = precision_recall(whole, half)
    assert (precision, recall) == (1.0, 0.5)
    assert precision_recall(half, whole) == (0.5, 1.0)


def test_too_few_points_have_no_neighbour() -> None:
    with pytest.raises(ValueError, match="3 samples have no neighbour number 3; give 4"):
        precision_recall(torch.rand(9, 2), torch.rand(3, 2))
    with pytest.raises(ValueError, match="2 reference"):
        precision_recall(torch.rand(2, 2), torch.rand(9, 2), neighbours=2)
