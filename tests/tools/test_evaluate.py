"""Evaluation of a checkpoint that another layout wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from triptych.data_pipeline import bigram_baseline, open_validation
from triptych.parallel.local import run_local
from triptych.tools.evaluate import evaluate


def test_agrees_with_the_loss_that_training_reported(trained_run: Any) -> None:
    said: list[str] = []
    evaluation = evaluate(trained_run.run_dir, progress=said.append)
    reported = trained_run.reports[-1].valid_loss
    assert evaluation.step == 6
    assert evaluation.samples == 6
    assert evaluation.loss == pytest.approx(reported, rel=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))
    assert evaluation.bigram_loss is None and evaluation.beats_bigram is None
    assert said


def test_batch_size_changes_nothing(trained_run: Any) -> None:
    whole, single = (evaluate(trained_run.run_dir, batch_size=size) for size in (6, 1))
    assert whole.targets == single.targets
    assert whole.loss == pytest.approx(single.loss, rel=1e-6)


def test_baseline_is_on_the_same_targets(runs: ModuleType, trained_run: Any) -> None:
    evaluation = evaluate(trained_run.run_dir, samples=4, baseline=True)
    data = runs.make_run(trained_run.corpus).data
    validation = open_validation(data, limit=4)
    assert validation is not None
    expected = bigram_baseline(data, runs.VOCABULARY, validation)
    assert evaluation.targets == expected.num_targets
    assert evaluation.bigram_loss == pytest.approx(expected.nats_per_token)
    assert evaluation.beats_bigram is (evaluation.loss < expected.nats_per_token)
    found = json.loads(json.dumps(evaluation.to_json()))
    assert found["bigram_loss"] == evaluation.bigram_loss
    assert evaluation.table() is not None


def test_bits_per_byte(trained_run: Any) -> None:
    evaluation = evaluate(trained_run.run_dir)
    assert evaluation.bits_per_byte is not None
    size = evaluation.loss * evaluation.targets / math.log(2) / evaluation.bits_per_byte
    # A byte-level token has one byte at least; this corpus has multi-byte ones.
    assert evaluation.targets * 0.8 < size < evaluation.targets * 8


def test_a_bf16_run_is_evaluated_in_bf16(runs: ModuleType, trained_run: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    reports = run_local(
        1, runs.train_on_ranks, trained_run.corpus, run_dir, {}, {"precision": "bf16", "steps": 1}
    )[0]
    assert evaluate(run_dir).loss == pytest.approx(reports[-1].valid_loss, rel=1e-3)


def test_errors(trained_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; give a run directory"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no checkpoint"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"samples=0 evaluates nothing"):
        evaluate(trained_run.run_dir, samples=0)
    with pytest.raises(ValueError, match=r"batch_size=0"):
        evaluate(trained_run.run_dir, batch_size=0)
