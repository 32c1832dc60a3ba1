"""The learning rate against its formulas, at every step."""

from __future__ import annotations

import math

import pytest

from triptych.training.config import ScheduleConfig
from triptych.training.schedule import factor


def curve(steps: int, **options: object) -> list[float]:
    config = ScheduleConfig.model_validate(options)
    return [factor(config, step, steps) for step in range(1, steps + 1)]


def test_warmup_rises_linearly_to_the_full_rate() -> None:
    for kind in ("cosine", "linear", "constant", "wsd"):
        assert curve(20, kind=kind, warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_and_linear_reach_the_floor_at_the_last_step() -> None:
    cosine = curve(10, kind="cosine", warmup=2, min_ratio=0.1)
    linear = curve(10, kind="linear", warmup=2, min_ratio=0.1)
    for step in range(3, 11):
        progress = (step - 2) / 8
        assert cosine[step - 1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        assert linear[step - 1] == pytest.approx(0.1 + 0.9 * (1 - progress))
    assert cosine[-1] == linear[-1] == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert curve(5, kind="constant", warmup=1, min_ratio=0.3) == [1.0] * 5


def test_wsd_is_stable_then_falls_like_one_minus_a_root() -> None:
    values = curve(20, kind="wsd", warmup=2, decay=8, min_ratio=0.0)
    assert values[2:12] == [1.0] * 10
    for nth, value in enumerate(values[12:], start=1):
        assert value == pytest.approx(1 - math.sqrt(nth / 8))
    assert values[-1] == pytest.approx(0.0)
    # A fifth of the steps when nothing is said.
    assert curve(20, kind="wsd")[15] == 1.0 > curve(20, kind="wsd")[16]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_length_has_a_rate(kind: str, steps: int) -> None:
    for warmup in range(steps + 1):
        assert all(0.0 <= value <= 1.0 for value in curve(steps, kind=kind, warmup=warmup))
