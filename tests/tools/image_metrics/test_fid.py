"""The Frechet distance against closed forms and scipy's matrix root; statistics in batches against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from triptych.tools.image_metrics.fid import (
    Gaussian,
    Moments,
    frechet_distance,
    load_statistics,
    save_statistics,
)


def gaussian(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(torch.tensor(mean).double(), torch.tensor(covariance).double())


def random_gaussian(size: int, rank: int, seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(size, generator=generator, dtype=torch.float64), factor @ factor.T / rank)


def by_scipy(a: Gaussian, b: Gaussian) -> float:
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    offset = (a.mean - b.mean).numpy()
    return float(offset @ offset + np.trace((a.covariance + b.covariance).numpy()) - 2 * np.trace(root).real)


def test_one_dimension() -> None:
    # (m1 - m2)^2 + (s1 - s2)^2
    assert frechet_distance(gaussian([1.0], [[9.0]]), gaussian([3.0], [[16.0]])) == pytest.approx(
        5.0, rel=1e-14
    )


def test_covariances_that_commute() -> None:
    # Both diagonal after one rotation: the sum of (s1 - s2)^2 along the axes.
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    a, b = torch.tensor([4.0, 25.0]).double(), torch.tensor([9.0, 1.0]).double()
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(
        Gaussian(zero, turn @ a.diag() @ turn.T), Gaussian(zero, turn @ b.diag() @ turn.T)
    )
    assert found == pytest.approx((2 - 3) ** 2 + (5 - 1) ** 2, rel=1e-13)


def test_a_scaled_gaussian() -> None:
    a = random_gaussian(20, 30, seed=1)
    b = Gaussian(a.mean, 4 * a.covariance)
    # C and 4 C: Tr(C + 4 C - 2 * 2 C) = Tr C.
    assert frechet_distance(a, b) == pytest.approx(float(a.covariance.trace()), rel=1e-12)


@pytest.mark.parametrize("size", [1, 3, 40])
def test_against_scipys_matrix_root(size: int) -> None:
    a, b = random_gaussian(size, 2 * size, seed=2), random_gaussian(size, 3 * size, seed=3)
    expected = by_scipy(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("size", "rank"), [(30, 60), (30, 7), (64, 63)])
def test_equal_gaussians_are_nothing_apart_even_when_singular(size: int, rank: int) -> None:
    a = random_gaussian(size, rank, seed=4)
    assert frechet_distance(a, a) < 1e-11 * float(a.covariance.trace())


def test_singular_covariances_in_orthogonal_subspaces() -> None:
    a = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    b = gaussian([0.0, 0.0], [[0.0, 0.0], [0.0, 1.0]])
    assert frechet_distance(a, b) == pytest.approx(2.0, rel=1e-14)
    point = gaussian([0.0, 3.0], [[0.0, 0.0], [0.0, 0.0]])
    assert frechet_distance(a, point) == pytest.approx(10.0, rel=1e-14)
    assert frechet_distance(point, point) == 0.0


def test_samples_of_known_gaussians_come_near_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = Moments(2), Moments(2)
    noise = torch.randn(2, 200_000, 2, generator=generator)
    a.add(noise[0] * torch.tensor([1.0, 2.0]))
    b.add(noise[1] * torch.tensor([3.0, 2.0]) + torch.tensor([0.0, 1.0]))
    assert frechet_distance(a.gaussian(), b.gaussian()) == pytest.approx((1 - 3) ** 2 + 1, abs=0.05)


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [37, 63], [0, 99, 0, 1]])
def test_batches_give_numpys_mean_and_covariance(sizes: list[int]) -> None:
    # A mean far from zero, where sums of squares would lose what is asked for.
    features = 1e6 + torch.randn(100, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    moments = Moments(5)
    for part in features.split(sizes):
        moments.add(part)
    found = moments.gaussian()
    assert found.count == 100
    np.testing.assert_allclose(found.mean, features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy(), rowvar=False), rtol=0, atol=1e-9)


def test_moments_say_what_they_cannot_take() -> None:
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"\(4, 2\) do not fit; \(N, 3\)"):
        moments.add(torch.zeros(4, 2))
    moments.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"1 sample.*2 or more"):
        moments.gaussian()
    moments.add(torch.tensor([[0.0, float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="not finite"):
        moments.gaussian()


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(ValueError, match="1 features cannot be compared with 2"):
        frechet_distance(gaussian([0.0], [[1.0]]), gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="eigenvalue -1 beside 1"):
        frechet_distance(
            gaussian([0.0, 0.0], [[0.0, 1.0], [1.0, 0.0]]), gaussian([0.0, 0.0], [[1, 0], [0, 1]])
        )
    with pytest.raises(ValueError, match=r"shape \(2,\).*\(3, 3\)"):
        Gaussian(torch.zeros(2), torch.zeros(3, 3))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def test_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    moments = Moments(4)
    moments.add(torch.randn(9, 4, generator=torch.Generator().manual_seed(7)))
    stored = moments.gaussian()
    # No suffix is put behind a name.
    path = tmp_path / "reference.stats"
    save_statistics(path, stored, "inception:abc")
    found = load_statistics(path)
    assert found is not None
    assert same(found.gaussian.mean, stored.mean) and same(found.gaussian.covariance, stored.covariance)
    assert (found.gaussian.count, found.extractor) == (9, "inception:abc")


def test_reads_adms_files(tmp_path: Path) -> None:
    path = tmp_path / "adm.npz"
    np.savez(path, mu=np.zeros(2, np.float32), sigma=np.eye(2), mu_s=np.zeros(3), sigma_s=np.eye(3))
    found = load_statistics(path)
    assert found is not None and found.extractor is None and found.gaussian.count is None
    assert found.gaussian.mean.dtype == torch.float64
    np.savez(path, arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    assert load_statistics(path) is None


def test_damaged_statistics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match=r"broken\.npz cannot be read as reference statistics"):
        load_statistics(path)
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(2))
    with pytest.raises(ValueError, match="mu but no sigma"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"\(F,\) and \(F, F\)"):
        load_statistics(path)
    np.save(tmp_path / "one.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"one\.npy cannot be read"):
        load_statistics(tmp_path / "one.npy")
