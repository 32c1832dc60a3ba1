"""The bench compares the same mathematics and reports what it saw; speed is not a test's business."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from triptych.tools import bench
from triptych.tools.bench import Case, Comparison, Side, bench_train, cases, largest_difference
from triptych.tools.bench_weights import load_into_transformers, unfuse

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the hf extra (transformers)"
)


@needs_transformers
def test_quick_run_agrees_with_transformers() -> None:
    report = bench_train(quick=True, threads=1)
    assert [one.case.kind for one in report.comparisons] == ["ssd", "step"]
    for one in report.comparisons:
        # Logits, loss and every gradient of both sides, in fp32.
        assert one.difference < 1e-4
        assert one.ours.median > 0 and one.theirs.median > 0
    assert set(report.versions) == {"torch", "transformers"}
    found = json.loads(json.dumps(report.to_json()))
    assert found["comparisons"][0]["speed_ratio"] == report.comparisons[0].speed_ratio
    assert report.table() is not None


@needs_transformers
def test_weights_go_to_bamba_and_back() -> None:
    from triptych.tools.bench_sides import our_model, their_model

    shape = bench.TINY["step"]
    ours, theirs = our_model(shape), their_model(shape)
    load_into_transformers(ours, theirs)
    back = unfuse(ours, dict(theirs.named_parameters()))
    assert back.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(back[name], parameter), name


@needs_transformers
def test_models_of_different_shape_are_told() -> None:
    from triptych.tools.bench_sides import our_model, their_model

    shape = bench.TINY["step"]
    with pytest.raises(RuntimeError, match=r"different parameters.*layers\.2"):
        load_into_transformers(our_model(shape), their_model(shape | {"layers": 3}))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'triptych\[hf\]'"):
        bench_train(quick=True)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"threads": 0}])
def test_senseless_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"give 1 or more"):
        bench_train(**options)


def test_a_side_that_fails_is_named(tmp_path: Path) -> None:
    case = Case("broken", "ssd", {"batch": 1})
    with pytest.raises(RuntimeError, match=r"(?s)broken, side ours: failed.*KeyError: 'length'"):
        bench.run_side(case, "ours", repeats=1, threads=1, folder=str(tmp_path))


def test_targets_decide() -> None:
    case = Case("step", "step", {}, target_speed=3.0, target_memory=0.7)
    fast, slow = Side([1.0, 9.0, 1.0], 50), Side([4.0], 100)
    one = Comparison(case, fast, slow, 0.0)
    assert (one.speed_ratio, one.memory_ratio, one.ok) == (4.0, 0.5, True)
    assert not Comparison(case, slow, fast, 0.0).ok
    assert Comparison(Case("shown", "step", {}), slow, fast, 0.0).ok


def test_the_cases_of_the_figures() -> None:
    targets = [(case.kind, case.target_speed, case.target_memory) for case in cases(quick=False)]
    assert ("ssd", 20.0, None) in targets and ("step", 3.0, 0.7) in targets


def test_largest_difference(tmp_path: Path) -> None:
    def write(name: str, tensors: dict[str, Any]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    ours = write("ours", {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)})
    theirs = write("theirs", {"a": torch.tensor([1.0, 4.0]), "b": torch.zeros(2)})
    assert largest_difference(ours, theirs) == 0.5
    with pytest.raises(RuntimeError, match=r"computed different things"):
        largest_difference(ours, write("less", {"a": torch.zeros(2)}))
    with pytest.raises(RuntimeError, match=r"a is \(2,\) here and \(3,\) there"):
        largest_difference(ours, write("other", {"a": torch.zeros(3), "b": torch.zeros(2)}))


def test_unknown_parameter_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match=r"different parameters"):
        load_into_transformers(nn.Linear(2, 2), nn.Linear(2, 2))
