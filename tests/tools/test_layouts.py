"""Layouts written as one word."""

from __future__ import annotations

import pytest

from triptych.parallel.config import ParallelConfig
from triptych.tools.layouts import DEFAULT, default_layouts, parse_layout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp2", {"tp": 2}),
        ("tp2.pp4", {"tp": 2, "pp": 4}),
        ("tp2,pp2,dp2", {"tp": 2, "pp": 2, "dp_shard": 2}),
        ("dp_shard2.dp_replicate3+full", {"dp_shard": 2, "dp_replicate": 3, "recompute": "full"}),
        ("tp2+selective+nosp", {"tp": 2, "recompute": "selective", "sequence_parallel": False}),
    ],
)
def test_parse(text: str, expected: dict[str, object]) -> None:
    layout = parse_layout(text, ParallelConfig())
    assert layout.text == text
    assert layout.config == ParallelConfig.model_validate(expected)


def test_what_is_not_said_stays_as_configured_but_for_the_axes() -> None:
    base = ParallelConfig(tp=8, dp_shard=4, recompute="full", sequence_parallel=False)
    assert parse_layout("pp2", base).config == ParallelConfig(pp=2, recompute="full", sequence_parallel=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp", r"'tp' is no axis and degree"),
        ("tp0", r"'tp0' is no axis and degree"),
        ("zp2", r"'zp2' is no axis and degree; write such as tp2"),
        ("", r"'' is no axis and degree"),
        ("tp2.tp4", r"gives tp twice"),
        ("dp2.dp_shard2", r"gives dp_shard twice"),
        ("tp2+quick", r"'quick' after \"\+\" is unknown; use one of none, selective"),
    ],
)
def test_errors_name_the_part(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layout(text, ParallelConfig())


def test_default_is_the_ten_with_every_recomputation() -> None:
    layouts = default_layouts(ParallelConfig())
    assert len(layouts) == len(set(DEFAULT)) == 10
    assert {layout.config.recompute for layout in layouts} == {"none", "selective", "full"}
    assert max(layout.config.world_size for layout in layouts) == 8
