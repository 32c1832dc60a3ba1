"""Experts over ep, with every other axis: the same losses, gradients and parameters as one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.parallel import training
from triptych.parallel.config import ParallelConfig

LOSSES = {"switch": 0.02, "importance": 0.03, "z": 0.01}
PATTERN = ["mamba2+moe", "attention+gelu", "attention_moe+moe", "mamba2+product_keys"]
EXPERT = {"intermediate_size": 8}
ATTENTION_MOE = {"num_experts": 4, "top_k": 2, "head_dim": 4, "losses": LOSSES}
PRODUCT_KEYS = {"num_experts": 16, "num_heads": 2, "top_k": 2, "key_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "dropless": {"num_experts": 4, "losses": LOSSES, "expert": EXPERT},
    "capacity": {"num_experts": 4, "routing": "capacity", "capacity_factor": 0.6, "expert": EXPERT},
    "noisy": {
        "num_experts": 4,
        "router": "noisy",
        "losses": {"load": 0.05, "importance": 0.05},
        "expert": EXPERT,
    },
    "unlike": {
        "num_experts": 4,
        "low_rank": 4,
        "rank": 2,
        "identity": 2,
        "losses": {"latency": 0.05},
        "expert": {**EXPERT, "kind": "gelu", "bias": True},
    },
    "sigmoid": {"num_experts": 4, "router": "sigmoid", "shared_experts": 1, "expert": EXPERT},
    "residual": {"num_experts": 4, "residual": True, "losses": LOSSES, "expert": EXPERT},
}
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "accumulated": ({}, 4),
    "dp_replicate2": ({"dp_replicate": 2}, 3),
    "ep2": ({"dp_replicate": 2, "ep": 2}, 3),
    "ep2.dp_shard2": ({"dp_shard": 2, "ep": 2, "recompute": "full"}, 6),
    "ep2.dp_shard4": ({"dp_shard": 4, "ep": 2, "recompute": "selective"}, 3),
    "ep4": ({"dp_shard": 2, "dp_replicate": 2, "ep": 4}, 3),
    "ep2.tp2": ({"dp_shard": 2, "ep": 2, "tp": 2}, 3),
    "ep2.tp2.dp_shard4": ({"dp_shard": 4, "ep": 2, "tp": 2, "recompute": "full"}, 3),
    "tp2": ({"tp": 2, "recompute": "full"}, 6),
    "ep2.tp2.nosp": ({"dp_replicate": 2, "ep": 2, "tp": 2, "sequence_parallel": False}, 6),
    "ep2.pp2": ({"dp_replicate": 2, "ep": 2, "pp": 2}, 2),
    "ep2.pp2.dp_shard4": ({"dp_shard": 4, "ep": 2, "pp": 2}, 3),
}


def config_of(case: str) -> Any:
    return training.model_config(
        pattern=PATTERN, moe=CASES[case], attention_moe=ATTENTION_MOE, product_keys=PRODUCT_KEYS
    )


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def of(case: str) -> dict[str, Any]:
        if case not in found:
            found[case] = training.train_alone(config_of(case))
        return found[case]

    return of


def matrix() -> list[Any]:
    """Every layout with dropless routing; the other ways on those that differ for them."""
    chosen = [("dropless", layout) for layout in LAYOUTS]
    chosen += [("capacity", layout) for layout in ("ep2", "ep4", "ep2.tp2", "ep2.pp2", "ep2.dp_shard2")]
    chosen += [(case, "ep2.tp2") for case in ("noisy", "unlike", "sigmoid", "residual")]
    return [pytest.param(case, layout, id=f"{case}-{layout}") for case, layout in chosen]


@pytest.mark.parametrize(("case", "layout"), matrix())
def test_layouts_agree(
    case: str, layout: str, alone: Callable[[str], dict[str, Any]], distributed: Callable[..., list[Any]]
) -> None:
    values, micro_batch_size = LAYOUTS[layout]
    parallel = ParallelConfig(**values)
    if case == "capacity":
        micro_batch_size = training.GLOBAL_BATCH // parallel.dp
    seen = distributed(
        parallel.world_size, training.train_under, config_of(case), parallel, micro_batch_size, timeout=120
    )[0]
    expected = alone(case)
    assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    assert seen["evaluations"] == pytest.approx(expected["evaluations"], rel=1e-9)
    assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-9)
    for which in ("initial", "gradients", "parameters"):
        assert seen[which].keys() == expected[which].keys(), which
        for name, tensor in expected[which].items():
            scale = max(float(tensor.abs().max()), 1e-6)
            assert float((seen[which][name] - tensor).abs().max()) <= 1e-9 * scale, (which, name)
