"""`triptych evaluate` of a vision run: the metrics of its own validation, whatever batches and layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.training.expert_runs import KINDS, expert_run, fit, write_digits
from triptych.data_pipeline.images import dataset as images
from triptych.launcher.cli import execute
from triptych.parallel.local import run_local
from triptych.tools.evaluate_vision import evaluate_vision
from triptych.tools.trained import load_trained
from triptych.training.data import image_needs

FIGURES = {"digits/top1", "digits/top5", "shapes/miou", "boxes/map50", *(f"{task}/loss" for task in KINDS)}
MANY = 10_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The directory of a run of two ranks of ep, and what its last validation said."""
    run_dir = tmp_path_factory.mktemp("run")
    train = {"steps": 3, "eval_every": 3, "eval_samples": 7}
    run = expert_run(data, train=train, parallel={"dp_shard": 2, "ep": 2})
    reports = run_local(2, fit, run, run_dir, timeout=100)[0]
    return run_dir, reports[-1].valid_metrics


def test_metrics_are_those_of_trainings_validation(trained: tuple[Path, dict[str, float]]) -> None:
    run_dir, expected = trained
    found = evaluate_vision(run_dir, samples=7, batch_size=4)
    assert found.metrics.keys() == expected.keys() and found.metrics.keys() >= FIGURES
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    # Seven of the digits, and all six of the two others, which have no more.
    assert found.samples == 7 + 6 + 6 and found.step == 3


def test_batches_change_nothing(trained: tuple[Path, dict[str, float]]) -> None:
    whole = evaluate_vision(trained[0], samples=7, batch_size=MANY)
    for batch_size in (1, 5):
        found = evaluate_vision(trained[0], samples=7, batch_size=batch_size)
        assert found.samples == whole.samples
        for name, value in whole.metrics.items():
            assert found.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), (name, batch_size)


def test_all_images_and_their_classes_counted_by_hand(trained: tuple[Path, dict[str, float]]) -> None:
    run_dir, _ = trained
    found = evaluate_vision(run_dir, batch_size=64)
    model: Any = load_trained(run_dir, "cpu")
    validation = images.open_validation(model.data, image_needs(model))
    assert validation is not None
    rows = [validation.sample(i) for i in range(len(validation))]
    digits = [row for row in rows if row["tasks"] == 0]
    assert found.samples == len(rows) == len(digits) + 12 and len(digits) > 300
    x = torch.from_numpy(np.stack([row["x"] for row in digits])).double()
    labels = torch.tensor([int(row["labels"]) for row in digits])
    with torch.no_grad():
        logits = model.module(x, tasks=torch.zeros(len(digits), dtype=torch.int64))[0]
    assert found.metrics["digits/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-9)
    assert found.metrics["digits/top1"] == float((logits.argmax(1) == labels).double().mean())
    best = logits.topk(5).indices.eq(labels.unsqueeze(1)).any(1)
    assert found.metrics["digits/top5"] == pytest.approx(float(best.double().mean()), rel=1e-12)
    assert found.parameters == sum(parameter.numel() for parameter in model.module.parameters())


def test_through_the_command_line(
    trained: tuple[Path, dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = trained
    words = ["evaluate", str(run_dir), "--samples", "2", "--batch-size", "3"]
    assert execute([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = evaluate_vision(run_dir, samples=2, batch_size=3)
    assert told == expected.to_json() and told["samples"] == 6
    assert all(map(math.isfinite, told["metrics"].values()))
    assert execute(words) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in FIGURES) and "Step 3" in shown
    assert execute(["evaluate", str(run_dir), "--baseline"]) != 0
    assert "baseline" in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_named(
    data: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    for name in ("samples", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0 evaluates nothing; give 1 or more"):
            evaluate_vision(trained[0], **{name: 0})
    with pytest.raises(ValueError, match="nowhere does not exist"):
        evaluate_vision(tmp_path / "nowhere")
    fit(expert_run(data, data={"valid": None}, train={"steps": 1}), tmp_path / "blind")
    with pytest.raises(ValueError, match=r"names no validation images \(data\.valid\)"):
        evaluate_vision(tmp_path / "blind")


def test_of_another_family(trained_run: Any) -> None:
    with pytest.raises(ValueError, match=r"the run is of model\.family=lm, which has no tasks of vision"):
        evaluate_vision(trained_run.run_dir)
