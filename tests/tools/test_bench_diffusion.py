"""The bench compares the same mathematics and reports what it saw; speed is not a test's business."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from triptych import kernels
from triptych.tools import bench_diffusion as bench
from triptych.tools import bench_rounds
from triptych.tools.bench import Case, Comparison, Side
from triptych.tools.bench_diffusion import SIDES, bench_diffusion, rounds
from triptych.tools.bench_diffusion_sides import Program, model_config, our_model
from triptych.tools.bench_dit import DiT, as_published
from triptych.tools.bench_rounds import RoundReport, Runner, run_round


def test_quick_run_agrees_with_the_published_formulation() -> None:
    report = bench_diffusion(quick=True, threads=1)
    assert [one.case.kind for one in report.comparisons] == ["step", "step", "tread"]
    assert report.beside == ["published", "published", "without"]
    for one in report.comparisons:
        # Prediction and every gradient of both sides, in fp32.
        assert 0 < one.difference < 1e-4
        assert len(one.ours.seconds) == len(one.theirs.seconds) == 1
        assert one.ours.median > 0 and one.theirs.peak_bytes > 0
    assert set(report.versions) == {"torch", "timm"}
    found = json.loads(json.dumps(report.to_json()))
    assert found["comparisons"][0]["speed_ratio"] == report.comparisons[0].speed_ratio
    assert found["comparisons"][2]["case"]["shape"]["routed"] == [2, 3]


@pytest.mark.parametrize("routed", [False, True], ids=["whole", "tread"])
def test_the_published_formulation_in_double_precision(routed: bool) -> None:
    """Weights, patches, positions and routes of the reference are ours, beyond what gradients tell."""
    config = model_config(bench.TINY)
    ours = our_model(config).double()
    published = DiT(config).double()
    published.load_state_dict(as_published(config, ours.state_dict()) | {"pos_embed": published.pos_embed})
    x, labels = torch.randn(2, 4, 8, 8).double(), torch.tensor([5, 1000])
    times = torch.tensor([3.0, 700.0]).double()
    kept = torch.tensor([[0, 3, 4, 9], [2, 5, 11, 15]]) if routed else None
    found = ours(x, times=times, labels=labels, kept=kept, routed=(1, 6))
    # The table of positions and the time's features are rounded to fp32 there.
    torch.testing.assert_close(found, published(x, times, labels, kept, (1, 6)), rtol=1e-5, atol=1e-6)
    assert found.abs().max() > 1e-3


def test_another_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program("ours", bench.TINY)
    assert program.difference() < 1e-5
    monkeypatch.setattr(kernels, "gelu", F.gelu)
    assert program.difference() > 1e-4


def test_sides_that_differ_are_not_timed_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def far_off(runners: list[Runner], **_: Any) -> dict[str, Any]:
        found = {"difference": 0.5, "versions": {}}
        return {runner.name: (Side([1.0], 1), found) for runner in runners}

    monkeypatch.setattr(bench_rounds, "run_round", far_off)
    with pytest.raises(
        RuntimeError, match=r"tiny DiT, recompute none differs by 5\.00e-01 .* a defect of ours"
    ):
        bench_diffusion(quick=True)


def test_sides_take_turns() -> None:
    tiny = bench.TINY | {"num_layers": 1}
    runners = [Runner("first", SIDES, "ours", tiny, tiny), Runner("second", SIDES, "published", tiny, tiny)]
    said: list[str] = []
    results = run_round(runners, repeats=3, threads=1, progress=said.append)
    assert said == ["first", "second"] == list(results)
    assert [len(side.seconds) for side, _ in results.values()] == [3, 3]
    assert results["second"][1]["difference"] == 0


def test_a_side_that_fails_is_named() -> None:
    broken = {key: value for key, value in bench.TINY.items() if key != "hidden_size"}
    with pytest.raises(RuntimeError, match=r"(?s)the broken one: failed.*KeyError: 'hidden_size'"):
        run_round([Runner("the broken one", SIDES, "ours", broken, bench.TINY)], repeats=1, threads=1)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"threads": 0}])
def test_senseless_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"give 1 or more"):
        bench_diffusion(**options)


def test_the_cases_of_the_figures() -> None:
    step, tread = rounds(quick=False)
    targets = [(case.name, case.target_speed, case.target_memory) for case, _, _ in step.cases + tread.cases]
    assert targets == [
        ("DiT-S/2, recompute none", 1.0, None),
        ("DiT-S/2, recompute selective", None, 1.0),
        ("DiT-S/2, 1024 tokens, TREAD 50%", pytest.approx(4 / 3), None),
    ]
    model = model_config(step.runners[0].shape)
    weights = sum(p.numel() for p in our_model(model).parameters())
    assert weights == 32_865_056, "DiT-S/2 as facts/diffusion.md counts it"
    routed = tread.runners[0].shape
    assert (routed["rate"], routed["routed"]) == (0.5, [2, 8])
    assert model_config(routed).num_tokens == 1024


def test_targets_decide() -> None:
    case = Case("step", "step", {}, target_speed=1.0, target_memory=0.9)
    fast, slow = Side([1.0, 9.0, 1.0], 50), Side([4.0], 100)

    def report(*comparisons: Comparison) -> RoundReport:
        besides = ["published"] * len(comparisons)
        return RoundReport(list(comparisons), besides, {"torch": "2"}, 1, "title", "A step", "the oracle")

    good, bad = Comparison(case, fast, slow, 0.0), Comparison(case, slow, fast, 0.0)
    assert report(good).ok and not report(good, bad).ok
    assert report(bad).to_json()["comparisons"][0]["ok"] is False
