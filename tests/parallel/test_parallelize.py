"""The promise: in float64 loss, gradients, gradient norm and parameters agree to 1e-9 under every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parallel import training
from triptych.models.config import LanguageConfig
from triptych.parallel.config import ParallelConfig

Distributed = Callable[..., list[Any]]
TOLERANCE = 1e-9

# One group of b and c and two key-value heads: replicated at tp 2 and 4, cut and shared.
UNTIED: dict[str, Any] = {"residual_scale": "learned", "attention": {"qk_norm": True}}
# Two groups, tied embeddings, and dropout of both kinds.
TIED: dict[str, Any] = {
    "tie_embeddings": True,
    "residual_scale": "depth",
    "norm": "layernorm",
    "dropout": 0.1,
    "attention": {"dropout": 0.1, "bias": True, "num_kv_heads": 4},
    "mamba2": {"num_groups": 2},
}
MODELS = {"untied": UNTIED, "tied": TIED}

# name -> (model, parallel, samples per micro-batch)
LAYOUTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "tp2": ("untied", {"tp": 2}, 6),
    "tp2 selective, whole sequences": (
        "tied",
        {"tp": 2, "sequence_parallel": False, "recompute": "selective"},
        6,
    ),
    "tp4 selective": ("untied", {"tp": 4, "recompute": "selective"}, 12),
    "tp4 full": ("tied", {"tp": 4, "recompute": "full"}, 6),
    "pp2 selective": ("untied", {"pp": 2, "recompute": "selective"}, 3),
    "pp4": ("untied", {"pp": 4}, 2),
    "pp4, fewer micro-batches than stages": ("untied", {"pp": 4, "recompute": "full"}, 12),
    "dp_shard2 full": ("tied", {"dp_shard": 2, "recompute": "full"}, 3),
    "dp_shard3, uneven": ("untied", {"dp_shard": 3}, 2),
    "dp_replicate2": ("tied", {"dp_replicate": 2}, 2),
    "dp_shard2 dp_replicate2 selective": (
        "tied",
        {"dp_shard": 2, "dp_replicate": 2, "recompute": "selective"},
        3,
    ),
    "tp2 pp2 full": ("untied", {"tp": 2, "pp": 2, "recompute": "full"}, 3),
    "tp2 dp_shard2 selective": ("tied", {"tp": 2, "dp_shard": 2, "recompute": "selective"}, 3),
    "tp2 pp2 dp_shard2": ("untied", {"tp": 2, "pp": 2, "dp_shard": 2, "recompute": "selective"}, 2),
    "tp2 pp2 dp_replicate2, whole sequences": (
        "untied",
        {"tp": 2, "pp": 2, "dp_replicate": 2, "sequence_parallel": False},
        3,
    ),
}


@functools.cache
def config(name: str) -> LanguageConfig:
    return training.model_config(**MODELS[name])


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return training.train_alone(config(name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str, distributed: Distributed) -> None:
    model, degrees, micro_batch_size = LAYOUTS[layout]
    parallel = ParallelConfig(**degrees)
    results = distributed(
        parallel.world_size, training.train_under, config(model), parallel, micro_batch_size
    )
    expected, seen = reference(model), results[0]
    assert all(torch.equal(seen["initial"][name], value) for name, value in expected["initial"].items())
    assert seen["initial"].keys() == expected["initial"].keys() == seen["gradients"].keys()
    difference, where = training.largest_difference(seen, expected)
    assert difference < TOLERANCE, f"{where} differs by {difference:.2e}"
    assert all(result["losses"] == seen["losses"] for result in results), "ranks saw different losses"
    assert all(result["norms"] == seen["norms"] for result in results), "ranks saw different norms"
    assert seen["writers"], "the writers' parts are not each element once"


def test_micro_batches_without_documents(distributed: Distributed) -> None:
    alone = distributed(1, training.without_documents, config("untied"), ParallelConfig())[0]
    for losses in distributed(2, training.without_documents, config("untied"), ParallelConfig(pp=2)):
        assert losses == pytest.approx(alone, rel=TOLERANCE)
    assert alone["all"] != pytest.approx(alone["first"], rel=TOLERANCE)


def test_difference_is_noticed() -> None:
    """The comparison itself: one element of one gradient is enough."""
    expected = reference("untied")
    changed = {**expected, "gradients": {n: g.clone() for n, g in expected["gradients"].items()}}
    changed["gradients"]["blocks.1.mixer.k_proj.weight"][0, 0] += 1e-6
    difference, where = training.largest_difference(changed, expected)
    assert difference > TOLERANCE and where == "gradients blocks.1.mixer.k_proj.weight"
    assert training.largest_difference(expected, expected)[0] == 0


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"dp_shard": 2}])
def test_logits_are_whole(degrees: dict[str, Any], distributed: Distributed) -> None:
    parallel = ParallelConfig(**degrees)
    logits = distributed(parallel.world_size, training.logits_under, config("tied"), parallel)
    expected = training.logits_alone(config("tied"))
    for rank in logits:
        torch.testing.assert_close(rank, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("degrees", [{"tp": 2, "dp_shard": 2, "recompute": "selective"}, {"dp_replicate": 2}])
def test_autocast_differs_by_rounding_only(degrees: dict[str, Any], distributed: Distributed) -> None:
    parallel = ParallelConfig(**degrees)
    alone = distributed(1, training.autocast_loss, config("untied"), ParallelConfig())[0]
    together = distributed(parallel.world_size, training.autocast_loss, config("untied"), parallel)[0]
    # bfloat16 has 8 bits: 2^-8 per matmul, in random directions.
    assert together["loss"] == pytest.approx(alone["loss"], rel=5e-3)
    assert together["norm"] == pytest.approx(alone["norm"], rel=3e-2)
    assert together["dtypes"] == alone["dtypes"] == {torch.float32}
