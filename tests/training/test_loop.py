"""A run is a function of its configuration and data: whatever the layout, and however often it was stopped.

Everything is float64, so curves of one layout agree bit by bit and curves of two to rounding.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.runs import CPU, Fault, Stopped, checked_run, fit, fit_ranks, make_run, write_corpus
from triptych import models
from triptych.training import checkpoint, store
from triptych.training.errors import NonFiniteLoss
from triptych.training.loading import load_model
from triptych.training.metrics import StepReport
from triptych.training.session import build
from triptych.training.shards import Window

TP2_DP2 = {"tp": 2, "dp_shard": 2}
PP2 = {"pp": 2, "recompute": "selective"}
LAST = "step-00000006"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[StepReport], Path]:
    """The reports and run directory of six steps in one process."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return fit(checked_run(corpus), run_dir), run_dir


def losses(reports: list[StepReport]) -> list[float]:
    return [report.loss for report in reports]


def parameters(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint, whole; moments too."""
    directory = run_dir / "checkpoints" / LAST
    whole = {}
    with store.open_reader(directory) as reader:
        for name, entry in reader.index.items():
            tensor = torch.empty(entry.shape, dtype=torch.float64)
            reader.read_into(Window(name, tensor, entry.shape, (0,) * len(entry.shape)))
            whole[name] = tensor
    return whole


def assert_same_end(run_dir: Path, expected_dir: Path, tolerance: float) -> None:
    got, expected = parameters(run_dir), parameters(expected_dir)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item() + 1e-30
        assert (got[name] - tensor).abs().max().item() <= tolerance * scale, name


def test_trains_and_reports(undisturbed: tuple[list[StepReport], Path]) -> None:
    reports, run_dir = undisturbed
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].loss < reports[0].loss
    assert [report.valid_loss is not None for report in reports] == [False, False, True] * 2
    assert reports[-1].tokens == 6 * 4 * 16 and reports[-1].eta_seconds == 0.0
    assert {"data", "forward_backward", "reduce_and_clip", "optimizer"} <= reports[0].phases.keys()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == losses(reports)
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["latest", "step-00000004", LAST]


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_micro_batches_change_nothing(
    corpus: Path, undisturbed: tuple[list[StepReport], Path], tmp_path: Path, micro_batch_size: int
) -> None:
    run = make_run(corpus, train={"micro_batch_size": micro_batch_size})
    assert losses(fit(run, tmp_path)) == pytest.approx(losses(undisturbed[0]), rel=1e-12)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    corpus: Path,
    undisturbed: tuple[list[StepReport], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = checked_run(corpus)
    with pytest.raises(Stopped):
        fit(run, tmp_path, Fault("stop", at=4))
    assert [path.name for path in store.list_steps(tmp_path / "checkpoints")] == ["step-00000002"]
    again = fit(run, tmp_path)
    assert [report.step for report in again] == [3, 4, 5, 6]
    assert losses(again) == losses(undisturbed[0])[2:]
    assert [r.valid_loss for r in again] == [r.valid_loss for r in undisturbed[0]][2:]
    assert [report.tokens for report in again] == [report.tokens for report in undisturbed[0]][2:]
    assert_same_end(tmp_path, undisturbed[1], 0.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert fit(run, tmp_path) == []
    assert "nothing is left to do" in caplog.text


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2}, PP2, {"dp_shard": 2}, {"dp_replicate": 2}],
    ids=["tp2", "pp2", "dp_shard2", "dp_replicate2"],
)
def test_any_layout_has_the_same_curve_and_validation(
    corpus: Path,
    undisturbed: tuple[list[StepReport], Path],
    tmp_path: Path,
    distributed: Callable[..., list[Any]],
    parallel: dict[str, Any],
) -> None:
    reports, *others = distributed(2, fit_ranks, corpus, parallel, tmp_path)
    assert others == [[]]
    assert losses(reports) == pytest.approx(losses(undisturbed[0]), rel=1e-10)
    for got, expected in zip(reports, undisturbed[0], strict=True):
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-9)
        assert got.valid_loss == (
            None if expected.valid_loss is None else pytest.approx(expected.valid_loss, rel=1e-10)
        )
    assert_same_end(tmp_path, undisturbed[1], 1e-9)


def test_stopped_at_tp2_dp2_and_resumed_at_pp2(
    corpus: Path,
    undisturbed: tuple[list[StepReport], Path],
    tmp_path: Path,
    distributed: Callable[..., list[Any]],
) -> None:
    stopped = distributed(4, fit_ranks, corpus, TP2_DP2, tmp_path, "stop", 5)
    assert stopped == ["Stopped: "] * 4
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004"
    reports, _ = distributed(2, fit_ranks, corpus, PP2, tmp_path)
    assert [report.step for report in reports] == [5, 6]
    assert losses(reports) == pytest.approx(losses(undisturbed[0])[4:], rel=1e-10)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == pytest.approx(losses(undisturbed[0]), rel=1e-10)
    assert_same_end(tmp_path, undisturbed[1], 1e-9)


def test_a_killed_rank_costs_nothing(
    corpus: Path,
    undisturbed: tuple[list[StepReport], Path],
    tmp_path: Path,
    distributed: Callable[..., list[Any]],
) -> None:
    parallel = {"dp_shard": 2}
    with pytest.raises(RuntimeError):
        distributed(2, fit_ranks, corpus, parallel, tmp_path, "kill", 6, 1)
    reports, _ = distributed(2, fit_ranks, corpus, parallel, tmp_path)
    assert reports[-1].step == 6 and len(reports) <= 4
    assert losses(reports) == pytest.approx(losses(undisturbed[0])[-len(reports) :], rel=1e-10)
    assert_same_end(tmp_path, undisturbed[1], 1e-9)


def test_nan_on_one_rank_stops_all_together(
    corpus: Path, tmp_path: Path, distributed: Callable[..., list[Any]]
) -> None:
    parallel = {"dp_shard": 2}
    outcomes = distributed(2, fit_ranks, corpus, parallel, tmp_path, "nan", 5, 1)
    assert len(set(outcomes)) == 1
    assert outcomes[0].startswith("NonFiniteLoss: the loss is not finite in step 5; it arose on data rank 1.")
    assert store.find_latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000004"


def test_a_step_that_is_not_finite_may_be_skipped(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(corpus, train={"max_skipped_steps": 1}, checkpoint={"every": 3})
    reports = fit(run, tmp_path, Fault("nan", at=3))
    assert [report.skipped for report in reports] == [False, False, True, False, False, False]
    assert reports[-1].skipped_steps == 1 and reports[-1].loss < 4.0
    assert "step 3 is skipped: loss nan (data ranks [0])" in caplog.text
    # The count is part of the run's state, so a second one ends it after a restart too.
    state = store.load_state(tmp_path / "checkpoints" / LAST)
    assert state["skipped_steps"] == 1 and state["optimizer_updates"] == 5
    longer = make_run(corpus, train={"max_skipped_steps": 1, "steps": 8})
    with pytest.raises(NonFiniteLoss, match="step 8 after 1 skipped steps"):
        fit(longer, tmp_path, Fault("nan", at=8))


def test_a_full_disk_while_saving_does_not_stop_training(
    corpus: Path,
    undisturbed: tuple[list[StepReport], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = checkpoint.write_file

    def full_from_step_4(path: Path, tensors: dict[str, Tensor]) -> str:
        if "step-00000002" not in path.parent.name:
            raise OSError(28, "No space left on device", str(path))
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_file", full_from_step_4)
    assert losses(fit(checked_run(corpus), tmp_path)) == losses(undisturbed[0])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000002"]
    assert "step 6 was NOT saved" in caplog.text


def test_a_corrupt_checkpoint_costs_only_its_steps(
    corpus: Path,
    undisturbed: tuple[list[StepReport], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = checked_run(corpus)
    with pytest.raises(Stopped):
        fit(run, tmp_path, Fault("stop", at=5))
    path = tmp_path / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    reports = fit(run, tmp_path)
    assert "rank-00000.safetensors does not match its checksum" in caplog.text
    assert losses(reports) == losses(undisturbed[0])[2:]


def test_a_checkpoint_becomes_a_model_on_one_device(
    corpus: Path, undisturbed: tuple[list[StepReport], Path]
) -> None:
    reports, run_dir = undisturbed
    model, config, state = load_model(run_dir, CPU, torch.float64)
    assert isinstance(model, models.LanguageModel) and not model.training
    assert config == checked_run(corpus).model and state["step"] == 6
    session = build(checked_run(corpus), run_dir=run_dir, device=CPU)
    assert session.validation is not None
    total, count = 0.0, 0
    for i in range(len(session.validation)):
        sample = session.validation.sample(i)
        row = {key: torch.from_numpy(sample[key])[None] for key in ("tokens", "targets", "document_ids")}
        with torch.no_grad():
            nll = model(row["tokens"], targets=row["targets"], document_ids=row["document_ids"])
        total, count = total + nll.sum().item(), count + int((row["targets"] != -100).sum())
    session.close()
    assert total / count == pytest.approx(reports[-1].valid_loss, rel=1e-12)


def test_another_model_is_refused(corpus: Path, undisturbed: tuple[list[StepReport], Path]) -> None:
    run = make_run(corpus, model={"num_layers": 4}, checkpoint={"resume": str(undisturbed[1])})
    with pytest.raises(ValueError, match=r"model.num_layers is 2 there and 4 here"):
        build(run, run_dir=undisturbed[1].parent / "other", device=CPU)
    assert not dist.is_initialized()


def test_validation_needs_data(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, train={"eval_every": 2}, data={"sources": [str(corpus / "train")], "seq_len": 16})
    assert run.data.valid is not None
    run = make_run(corpus, train={"eval_every": 2}, data={"valid": None})
    with pytest.raises(ValueError, match=r"train.eval_every=2 needs validation data; .*data.valid"):
        build(run, run_dir=tmp_path, device=CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_follow_float64(
    corpus: Path, undisturbed: tuple[list[StepReport], Path], tmp_path: Path, precision: str
) -> None:
    reports = fit(make_run(corpus, train={"precision": precision}), tmp_path)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    assert losses(reports) == pytest.approx(losses(undisturbed[0]), rel=tolerance)
    with store.open_reader(tmp_path / "checkpoints" / LAST) as reader:
        assert {entry.dtype for entry in reader.index.values()} == {"F32"}


def test_a_trace_on_request(corpus: Path, tmp_path: Path) -> None:
    fit(make_run(corpus, train={"steps": 3, "schedule": {}}, log={"profile": {"start": 2}}), tmp_path)
    trace = json.loads((tmp_path / "profile" / "rank-00000.json").read_text())
    assert any("triptych" in event.get("name", "") for event in trace["traceEvents"])


def test_synchronous_saves_and_sparse_logs(
    corpus: Path, undisturbed: tuple[list[StepReport], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = make_run(corpus, checkpoint={"async_save": False}, log={"every": 4, "tensorboard": False})
    reports = fit(run, tmp_path)
    assert [report.step for report in reports] == [4, 6]
    assert losses(reports) == [undisturbed[0][3].loss, undisturbed[0][5].loss]
    assert os.listdir(tmp_path / "checkpoints" / LAST)
