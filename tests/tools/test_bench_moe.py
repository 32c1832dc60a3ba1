"""The bench compares the same mathematics and reports what it saw; speed is not a test's business."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from triptych import kernels
from triptych.tools import bench_moe as bench
from triptych.tools import bench_moe_sides, bench_rounds
from triptych.tools.bench import Side
from triptych.tools.bench_moe import TINY_LAYER, TINY_RETRIEVAL, bench_moe, rounds
from triptych.tools.bench_moe_peers import best_of_scores, keys_of_table, table_of_keys
from triptych.tools.bench_moe_sides import Layer, Retrieval, program
from triptych.tools.bench_rounds import Runner


def test_quick_run_agrees_with_the_formulas() -> None:
    report = bench_moe(quick=True, threads=1)
    assert [one.case.kind for one in report.comparisons] == ["layer", "layer", "retrieval", "retrieval"]
    assert report.beside[:2] == ["loop over experts", "every expert, every token"]
    for one in report.comparisons:
        # Results and every gradient of both sides, in fp32.
        assert 0 < one.difference < 1e-4
        assert len(one.ours.seconds) == len(one.theirs.seconds) == 1
        assert one.ours.median > 0 and one.theirs.median > 0
    assert set(report.versions) == {"torch"}
    found = json.loads(json.dumps(report.to_json()))
    assert found["comparisons"][0]["speed_ratio"] == report.comparisons[0].speed_ratio
    assert report.table() is not None


@pytest.mark.parametrize("side", ["ours", "loop", "dense"])
def test_each_layer_is_the_formula_and_leaves_nothing_behind(side: str) -> None:
    one = Layer(side, TINY_LAYER)
    one.once()
    assert one.x_NC.grad is None and all(p.grad is None for p in one.module.parameters())
    assert 0 < one.difference() < 1e-5


@pytest.mark.parametrize("side", ["ours", "scores", "sums"])
def test_each_retrieval_is_the_formula(side: str) -> None:
    one = Retrieval(side, TINY_RETRIEVAL)
    one.once()
    assert one.queries_NHD.grad is None and one.table.grad is None
    assert 0 < one.difference() < 1e-5


def test_another_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, retrieval = Layer("ours", TINY_LAYER), Retrieval("ours", TINY_RETRIEVAL)
    combine, topk = kernels.moe_combine, kernels.product_key_topk
    monkeypatch.setattr(kernels, "moe_combine", lambda rows, weights, *x: combine(rows, weights * 1.01, *x))
    assert layer.difference() > 1e-3
    monkeypatch.setattr(bench_moe_sides, "product_key_topk", lambda q, keys, k: topk(q, keys.flip(1), k))
    assert retrieval.difference() == math.inf


def test_gradients_that_are_missing_are_noticed() -> None:
    layer = Layer("loop", TINY_LAYER)
    layer.module.requires_grad_(False)
    with pytest.raises(AssertionError, match="backward reached every parameter"):
        layer.difference()


def test_a_table_of_keys_scores_as_the_half_keys_do() -> None:
    keys = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(5, 2, 6, dtype=torch.float64)
    table = table_of_keys(keys.detach()).requires_grad_()
    scores, experts = best_of_scores(queries, table, 3)
    expected, places = kernels.product_key_topk(queries, keys, 3)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(experts, places)
    upstream = torch.randn(scores.shape, dtype=torch.float64)
    scores.backward(upstream)
    expected.backward(upstream)
    assert table.grad is not None
    torch.testing.assert_close(keys_of_table(table.grad, 4), keys.grad)


def test_sides_that_differ_are_not_timed_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def far_off(runners: list[Runner], **_: Any) -> dict[str, Any]:
        return {one.name: (Side([1.0], 1), {"difference": 0.5, "versions": {}}) for one in runners}

    monkeypatch.setattr(bench_rounds, "run_round", far_off)
    with pytest.raises(RuntimeError, match=r"4 experts, top 2 differs by 5\.00e-01 .* the formulas in fp64"):
        bench_moe(quick=True)


def test_memory_of_processes_of_its_own() -> None:
    """48 MiB of scores, held while their 96 MiB of gradient and a copy arise, are seen."""
    shape = TINY_RETRIEVAL | {"tokens": 1536, "experts": 4096}
    runner = Runner("scores", bench.SIDES, "scores", shape, TINY_RETRIEVAL)
    found = bench_rounds.run_round([runner], repeats=1, threads=1, exact_memory=True)
    side, _ = found["scores"]
    assert 48 * 2**20 < side.peak_bytes < 400 * 2**20


@pytest.mark.parametrize("options", [{"repeats": 0}, {"threads": 0}])
def test_senseless_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"give 1 or more"):
        bench_moe(**options)


def test_the_cases_of_the_figures() -> None:
    layer, retrieval = rounds(quick=False)
    found = [
        (beside, case.target_speed, case.target_memory) for case, _, beside in layer.cases + retrieval.cases
    ]
    assert found == [
        ("loop over experts", 1.0, 1.0),
        ("every expert, every token", 4.0, None),
        ("scores of all", 5.0, None),
        ("sums of all pairs", None, None),
    ]
    shape = layer.runners[0].shape
    assert (shape["experts"], shape["top_k"], shape["tokens"], shape["hidden_size"]) == (16, 2, 4096, 256)
    assert retrieval.runners[0].shape["experts"] == 4096


def test_kinds_of_programs() -> None:
    assert isinstance(program("loop", TINY_LAYER), Layer)
    assert isinstance(program("sums", TINY_RETRIEVAL), Retrieval)
