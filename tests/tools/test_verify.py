"""`verify` passes what is the same, names what is not, and says why a layout did not run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from triptych.parallel.config import ParallelConfig
from triptych.parallel.local import run_local
from triptych.tools import verify as verify_module
from triptych.tools.layouts import parse_layout
from triptych.tools.verify import VerifyReport, verify
from triptych.tools.verify_rank import Job, run_rank
from triptych.tools.verify_samples import corpus_samples, synthetic_samples
from triptych.training.objectives import LanguageModeling


def test_layouts_are_the_same_training(runs: ModuleType) -> None:
    said: list[str] = []
    report = verify(
        runs.make_run(),
        ["tp2+selective", "pp2.dp_shard2+full"],
        steps=2,
        synthetic=True,
        progress=said.append,
    )
    assert report.ok, report.to_json()
    assert [result.world_size for result in report.results] == [2, 4]
    assert all(result.gradient.relative < 1e-11 for result in report.results)
    assert len(report.losses) == 2
    assert len(said) == 1 + 2 * 2
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert report.table() is not None


def test_a_difference_is_found_and_named(runs: ModuleType, tmp_path: Path) -> None:
    run = runs.make_run()
    train = run.train.model_copy(update={"precision": "fp64"})
    samples = synthetic_samples(run, 1)
    job = Job(run.model, ParallelConfig(), train, LanguageModeling(), 16, samples, str(tmp_path))
    (reference,) = run_local(1, run_rank, job, None)
    # What a layout with another initialisation would report.
    other = replace(job, train=train.model_copy(update={"seed": 1}))
    ranks = run_local(1, run_rank, other, reference)
    layout = parse_layout("tp1", ParallelConfig())
    result = verify_module._judge(layout, reference, ranks, 1e-9, 0.0)
    assert not result.ok
    assert result.gradient.relative > 1e-3 and result.gradient.name in reference.gradients
    report = VerifyReport([result], {}, {}, 1, 1e-9, reference.losses)
    assert not report.ok
    assert f"worst gradient {result.gradient.name}" in report._complaint(result)


def test_nan_is_a_difference(runs: ModuleType, tmp_path: Path) -> None:
    run = runs.make_run()
    train = run.train.model_copy(update={"precision": "fp64"})
    samples = synthetic_samples(run, 1)
    job = Job(run.model, ParallelConfig(), train, LanguageModeling(), 16, samples, str(tmp_path))
    (reference,) = run_local(1, run_rank, job, None)
    broken = replace(reference, losses=[float("nan")])
    layout = parse_layout("tp1", ParallelConfig())
    assert not verify_module._judge(layout, reference, [broken], 1e-9, 0.0).ok


def test_a_layout_that_fails_is_reported_and_the_others_run(
    runs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify_module.run_local

    def fail(world_size: int, *args: Any, **kwargs: Any) -> Any:
        if world_size == 2:
            raise RuntimeError("a rank fell over")
        return real(world_size, *args, **kwargs)

    monkeypatch.setattr(verify_module, "run_local", fail)
    report = verify(runs.make_run(), ["tp2", "tp1"], steps=1, synthetic=True)
    assert report.failed == {"tp2": "RuntimeError: a rank fell over"}
    assert [result.layout for result in report.results] == ["tp1"]
    assert not report.ok


def test_a_named_layout_must_be_legal(runs: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"parallel\.tp=3 does not divide model\.attention\.num_heads=4"):
        verify(runs.make_run(), ["tp3"], synthetic=True)


def test_default_layouts_that_are_illegal_are_dropped_with_their_reason(runs: ModuleType) -> None:
    run = runs.make_run(model={"num_layers": 2}, train={"global_batch_size": 1})
    chosen, skipped = verify_module._choose(run, None)
    assert [layout.text for layout in chosen] == [
        "tp2+selective",
        "tp4+none",
        "pp2+full",
        "tp2.pp2+selective",
    ]
    assert "parallel.pp=4 exceeds model.num_layers=2" in skipped["pp4+none"]
    assert "train.global_batch_size=1 is not a multiple" in skipped["dp_shard2+selective"]


def test_missing_corpus_points_to_synthetic(runs: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"missing.*--synthetic"):
        verify(runs.make_run(), ["tp2"])


def test_no_steps_is_refused(runs: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"steps=0"):
        verify(runs.make_run(), ["tp2"], steps=0, synthetic=True)


def test_samples_of_the_corpus_are_the_runs_own(runs: ModuleType, trained_run: Any) -> None:
    run = runs.make_run(trained_run.corpus)
    first, second = corpus_samples(run, 2)
    for samples in (first, second):
        assert samples["tokens"].shape == samples["targets"].shape == (4, 16)
        assert samples["sample_keys"].shape == (4,)
        assert int(samples["tokens"].max()) < runs.VOCABULARY
    assert not set(first["sample_keys"].tolist()) & set(second["sample_keys"].tolist())


def test_synthetic_samples_have_documents_without_targets_across(runs: ModuleType) -> None:
    (samples,) = synthetic_samples(runs.make_run(train={"global_batch_size": 8}), 1)
    assert samples["tokens"].shape == (8, 16)
    last = samples["document_ids"][:, 1:] != samples["document_ids"][:, :-1]
    assert bool((samples["targets"][:, :-1][last] == -100).all())
    assert bool((samples["targets"][:, :-1][~last] == samples["tokens"][:, 1:][~last]).all())
