"""Rotary angles and fixed tables of sines, against other writings of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.models.plain_dit import position_table
from triptych.models.positions import axial_rope, grid_positions, rotate, sincos

CPU = torch.device("cpu")
THETA = 10000.0


def turned(
    x: torch.Tensor, grid: tuple[int, ...], kind: str = "none", trained: tuple[int, ...] | None = None
) -> torch.Tensor:
    rope = axial_rope(x.shape[-1], THETA, grid, trained or grid, kind, CPU)
    return rotate(x, grid_positions(grid, CPU), THETA, rope)


def complex_rope(x: np.ndarray, places: np.ndarray, frequencies: list[np.ndarray]) -> np.ndarray:
    """x (T, D) as complex numbers, multiplied by e^(i angle); axis a turns the a-th part of the channels, in
    which channel k and channel k + half make a number."""
    parts = []
    for axis, (part, frequency) in enumerate(zip(np.split(x, len(frequencies), axis=-1), frequencies)):
        real, imaginary = np.split(part, 2, axis=-1)
        z = (real + 1j * imaginary) * np.exp(1j * places[:, axis, None] * frequency)
        parts += [z.real, z.imag]
    return np.concatenate(parts, axis=-1)


@pytest.mark.parametrize(("grid", "head_dim"), [((5,), 8), ((3, 4), 16), ((2, 3, 2), 12)])
def test_rotation_is_complex_multiplication(grid: tuple[int, ...], head_dim: int) -> None:
    axes, count = len(grid), math.prod(grid)
    x = torch.randn(2, count, 3, head_dim, dtype=torch.float64)
    found = turned(x, grid)
    places = np.array([np.unravel_index(n, grid) for n in range(count)], dtype=np.float64)
    size = head_dim // axes
    frequencies = [THETA ** (-2.0 * np.arange(size // 2) / size)] * axes
    for row, head in ((0, 0), (1, 2)):
        expected = complex_rope(x[row, :, head].numpy(), places, frequencies)
        np.testing.assert_allclose(found[row, :, head].numpy(), expected, rtol=0, atol=1e-12)


def test_scores_depend_on_the_distance_along_each_axis() -> None:
    """All tokens have one query and one key: q at (r, c) against k at (r', c') is a function of the two
    differences alone."""
    grid = (4, 5)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    queries = turned(q.expand(1, 20, 1, 16), grid)[0, :, 0]
    keys = turned(k.expand(1, 20, 1, 16), grid)[0, :, 0]
    scores = (queries @ keys.T).reshape(4, 5, 4, 5)
    by_distance: dict[tuple[int, int], list[float]] = {}
    for r, c, r2, c2 in np.ndindex(4, 5, 4, 5):
        by_distance.setdefault((r2 - r, c2 - c), []).append(float(scores[r, c, r2, c2]))
    assert len(by_distance) == 7 * 9
    for found in by_distance.values():
        assert max(found) - min(found) < 1e-12
    centres = sorted(found[0] for found in by_distance.values())
    assert min(b - a for a, b in pairwise(centres)) > 0, "each distance has a score of its own"


def test_packed_positions_turn_as_those_of_a_grid() -> None:
    x = torch.randn(2, 12, 1, 8, dtype=torch.float64)
    rope = axial_rope(8, THETA, (3, 4), (3, 4), "none", CPU)
    positions = grid_positions((3, 4), CPU).expand(2, -1, -1).clone()
    positions[1] = positions[1].flip(0)
    found = rotate(x, positions, THETA, rope)
    expected = turned(x, (3, 4))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1].flip(0), turned(x[1:].flip(1), (3, 4))[0], rtol=0, atol=0)


def independent_frequencies(kind: str, size: int, now: int, trained: int) -> list[float]:
    """FiT's (arXiv 2402.12376) and YaRN's (arXiv 2309.00071) formulas, one frequency at a time."""
    s = max(1.0, now / trained)
    found = []
    for i in range(size // 2):
        base = THETA * s ** (size / (size - 2)) if kind == "ntk" else THETA
        f = 1 / base ** (2 * i / size)
        if kind == "yarn":
            turns = trained / (2 * math.pi / f)
            gamma = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / (32 - 1)
            f = (1 - gamma) * f / s + gamma * f
        found.append(f)
    return found


@pytest.mark.parametrize("kind", ["none", "ntk", "yarn"])
@pytest.mark.parametrize("grid", [(16, 16), (20, 16), (48, 10), (320, 640)])
def test_extrapolation_follows_the_papers(kind: str, grid: tuple[int, ...]) -> None:
    trained = (16, 160)
    rope = axial_rope(48, THETA, grid, trained, kind, CPU)
    for axis in (0, 1):
        expected = independent_frequencies(kind, 24, grid[axis], trained[axis])
        torch.testing.assert_close(rope.frequencies[axis], torch.tensor(expected, dtype=torch.float64))
    largest = max(1.0, grid[0] / 16, grid[1] / 160)
    assert rope.temperature == pytest.approx((0.1 * math.log(largest) + 1) ** 2 if kind == "yarn" else 1.0)


def test_within_the_trained_size_nothing_changes() -> None:
    for kind in ("ntk", "yarn"):
        for grid in ((16, 16), (8, 3)):
            scaled = axial_rope(32, THETA, grid, (16, 16), kind, CPU)
            plain = axial_rope(32, THETA, grid, (16, 16), "none", CPU)
            assert all(map(torch.equal, scaled.frequencies, plain.frequencies))
            assert scaled.temperature == 1.0


def test_ntk_stretches_the_lowest_frequency_and_keeps_the_highest() -> None:
    plain = axial_rope(16, THETA, (16,), (16,), "none", CPU).frequencies[0]
    scaled = axial_rope(16, THETA, (48,), (16,), "ntk", CPU).frequencies[0]
    assert float(scaled[0]) == 1.0
    assert float(plain[-1] / scaled[-1]) == pytest.approx(3.0)


def test_axes_are_scaled_apart() -> None:
    both = axial_rope(16, THETA, (32, 16), (16, 16), "ntk", CPU)
    assert not torch.equal(both.frequencies[0], both.frequencies[1])
    assert torch.equal(
        both.frequencies[1], axial_rope(16, THETA, (16, 16), (16, 16), "ntk", CPU).frequencies[1]
    )


def test_the_table_of_sines_is_the_papers() -> None:
    found = sincos(grid_positions((3, 4), CPU), 16)
    torch.testing.assert_close(found, position_table((3, 4), 16), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [1, 3])
def test_tables_of_one_and_three_axes_tell_places_apart(axes: int) -> None:
    grid = (4, 3, 2)[:axes]
    (table,) = sincos(grid_positions(grid, CPU), 24)
    assert table.shape == (math.prod(grid), 24)
    distances = torch.cdist(table, table) + 10 * torch.eye(len(table), dtype=torch.float64)
    assert float(distances.min()) > 0.1
    # The last axis first: its part does not change from line to line.
    along = table.reshape(*grid, 24)[..., : 24 // axes]
    assert torch.equal(along[0], along[-1]) or axes == 1


def test_coordinates_are_in_raster_order() -> None:
    assert grid_positions((2, 3), CPU).tolist() == [[[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]]
