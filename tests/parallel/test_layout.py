"""Layouts: coordinates, groups, and a reason with a mend for each that is illegal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from tests.parallel.training import model_config
from triptych.models.config import LanguageConfig
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import Layout, build_mesh

Distributed = Callable[..., list[Any]]


def check(parallel: dict[str, Any], seq_len: int = 16, batch: int = 8, micro: int = 1, **model: Any) -> None:
    layout = Layout(ParallelConfig(**parallel))
    layout.check(model_config(**model), seq_len=seq_len, global_batch_size=batch, micro_batch_size=micro)


ILLEGAL: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"parallel": {"tp": 3}},
        r"parallel\.tp=3 does not divide model\.attention\.num_heads=4; use 1, 2 or 4",
    ),
    "key-value heads": (
        {"parallel": {"tp": 4}, "attention": {"num_heads": 12, "num_kv_heads": 6}},
        r"tp=4 is neither a divisor nor a multiple of model\.attention\.num_kv_heads=6; use 1, 2, 3, 6 or 12",
    ),
    "mamba heads": (
        {"parallel": {"tp": 3}, "pattern": "M", "mamba2": {"head_dim": 8}},
        r"tp=3 does not divide expand \* hidden_size / head_dim \(heads\) of model\.mamba2=4; use 1, 2 or 4",
    ),
    "groups": (
        {"parallel": {"tp": 4}, "pattern": "M", "hidden_size": 24, "mamba2": {"num_groups": 6}},
        r"tp=4 is neither a divisor nor a multiple of model\.mamba2\.num_groups=6; use 1, 2, 3, 6 or 12",
    ),
    "vocabulary": (
        {"parallel": {"tp": 4}, "vocab_size": 22},
        r"parallel\.tp=4 does not divide model\.vocab_size=22; use 1, 2, 11 or 22",
    ),
    "intermediate size": (
        {"parallel": {"tp": 4}, "ffn": {"intermediate_size": 30}},
        r"parallel\.tp=4 does not divide model\.ffn\.intermediate_size=30; use 1, 2, 3, 5, 6, 10, 15 or 30",
    ),
    "sequence": (
        {"parallel": {"tp": 4}, "seq_len": 18},
        r"tp=4 does not divide data\.seq_len=18; use 1, 2, 3, 6, 9 or 18; or set parallel\.sequence_par",
    ),
    "stages": (
        {"parallel": {"pp": 5}},
        r"parallel\.pp=5 exceeds model\.num_layers=4: a stage would have no block; use at most 4",
    ),
    "tied stages": (
        {"parallel": {"pp": 2}, "tie_embeddings": True},
        r"parallel\.pp=2 with model\.tie_embeddings=true.*use parallel\.pp=1 or model\.tie_embeddings=false",
    ),
    "batch": (
        {"parallel": {"dp_shard": 2, "dp_replicate": 2}, "batch": 30, "micro": 2},
        r"train\.global_batch_size=30 is not a multiple of .* = 2 \* 2 \* 2 = 8; use 24 or 32",
    ),
    "small batch": (
        {"parallel": {"dp_shard": 4}, "batch": 3},
        r"train\.global_batch_size=3 is not a multiple of .* = 4; use 4, or change train\.micro_batch_size",
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_layout_says_why_and_what_would_do(case: str) -> None:
    arguments, message = ILLEGAL[case]
    with pytest.raises(ValueError, match=message):
        check(**arguments)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tp": 4},
        {"tp": 2, "pp": 4, "dp_shard": 2, "dp_replicate": 2},
        {"tp": 2, "sequence_parallel": False},
        {"dp_shard": 8},
    ],
)
def test_legal_layouts_pass(parallel: dict[str, Any]) -> None:
    check(parallel, seq_len=17 if parallel.get("sequence_parallel") is False else 16)


def test_unused_mixers_do_not_restrict() -> None:
    check({"tp": 3}, seq_len=18, pattern="-", hidden_size=18, ffn={"intermediate_size": 24})


def test_a_reserved_axis_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"parallel\.cp=2 is reserved: .*; use 1"):
        ParallelConfig(cp=2)


@pytest.mark.parametrize(
    ("values", "remaining"),
    [
        ({"dp_shard": 4, "ep": 2}, (1, 2)),
        ({"dp_shard": 4, "ep": 4}, (1, 1)),
        ({"dp_replicate": 2, "ep": 2}, (1, 1)),
        ({"dp_replicate": 2, "dp_shard": 2, "ep": 4}, (1, 1)),
        ({"dp_replicate": 2, "dp_shard": 4, "ep": 2, "tp": 2}, (2, 2)),
    ],
)
def test_experts_are_folded_over_data_ranks(values: dict[str, Any], remaining: tuple[int, int]) -> None:
    config = ParallelConfig(**values)
    assert (config.expert_replicate, config.expert_shard) == remaining
    assert config.expert_replicate * config.expert_shard * config.ep == config.dp


@pytest.mark.parametrize(
    "values", [{"ep": 2}, {"dp_shard": 4, "ep": 3}, {"dp_shard": 2, "dp_replicate": 3, "ep": 4}]
)
def test_experts_that_do_not_divide_the_data_ranks_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(
        ValidationError, match=r"parallel\.ep=\d is folded over the \d data ranks .*; use one of 1"
    ):
        ParallelConfig(**values)


@pytest.mark.parametrize("values", [{"tp": 0}, {"recompute": "some"}, {"tensor": 2}])
def test_schema_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ParallelConfig(**values)


def test_coordinates_follow_the_order_of_the_mesh() -> None:
    layout = Layout(ParallelConfig(pp=2, dp_replicate=2, dp_shard=2, tp=2))
    assert layout.world_size == 16 and layout.dp_size == 4
    assert layout.coordinates(0) == {"pp": 0, "dp_replicate": 0, "dp_shard": 0, "cp": 0, "tp": 0}
    assert layout.coordinates(13) == {"pp": 1, "dp_replicate": 1, "dp_shard": 0, "cp": 0, "tp": 1}
    assert [layout.dp_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert layout.tensor_parallel_groups() == [[first, first + 1] for first in range(0, 16, 2)]
    table = layout.table()
    assert [row["rank"] for row in table] == list(range(16))
    assert table[13] == {"rank": 13, **layout.coordinates(13), "dp_rank": 2}


def mesh_coordinates(parallel: ParallelConfig) -> dict[str, int]:
    mesh = build_mesh(Layout(parallel), "cpu")
    return {axis: mesh.get_local_rank(axis) for axis in mesh.mesh_dim_names or ()}


def test_mesh_agrees_with_the_layout(distributed: Distributed) -> None:
    parallel = ParallelConfig(pp=2, dp_shard=2, tp=2)
    layout = Layout(parallel)
    assert distributed(8, mesh_coordinates, parallel) == [layout.coordinates(rank) for rank in range(8)]


def test_mesh_of_another_size_is_refused(distributed: Distributed) -> None:
    message = r"the layout has 4 ranks \(pp 2 \* tp 2\), but 2 are running"
    with pytest.raises(RuntimeError, match=message):
        distributed(2, mesh_coordinates, ParallelConfig(pp=2, tp=2))


def test_check_needs_no_weights() -> None:
    config = LanguageConfig(
        vocab_size=131072, hidden_size=16384, num_layers=8, attention={"num_heads": 128, "num_kv_heads": 8}
    )
    layout = Layout(ParallelConfig(tp=16, pp=8))
    layout.check(config, seq_len=8192, global_batch_size=64, micro_batch_size=1)
