"""Numbers for people."""

from __future__ import annotations

import pytest

from triptych.tools.describe import _held, _ranges
from triptych.tools.render import bytes_text, count_text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5 TiB")]
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1_234_567, "1.23 M"), (7.2e15, "7.2 P")]
)
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text


def test_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _ranges([]) == ""


def test_held_elements_are_cut_as_fsdp_does() -> None:
    assert [_held((5, 3), 4, rank) for rank in range(4)] == [6, 6, 3, 0]
    assert _held((), 4, 3) == 1
