"""Reports on disk: each step once, whatever restarts happened; MFU only where a peak is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from triptych.training.metrics import MetricsWriter, StepReport, memory_bytes, peak_flops, peak_of, truncate


def report(step: int, loss: float = 1.5) -> StepReport:
    return StepReport(
        step=step,
        total=10,
        loss=loss,
        lr=0.1,
        grad_norm=2.0,
        tokens=64 * step,
        tokens_per_second=100.0,
        memory_bytes=10,
        mfu=None,
        eta_seconds=1.0,
        valid_loss=3.0 if step == 2 else None,
        phases={"data": 0.5},
    )


def write(run_dir: Path, start: int, steps: range) -> None:
    writer = MetricsWriter(run_dir, start=start, tensorboard=True, config_text="model: {}")
    for step in steps:
        writer.write(report(step))
    writer.close()


def test_each_step_appears_once_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, 3, range(4, 8))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert "mfu" not in records[0] and records[1]["valid_loss"] == 3.0
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    tags = set(board.Tags()["scalars"])
    assert {"valid/loss", "train/learning_rate", "train/grad_norm", "seconds/data"} <= tags
    assert "speed/mfu" not in tags
    assert "config/text_summary" in board.Tags()["tensors"]


def test_a_loss_that_is_no_number_stays_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, start=0, tensorboard=False, config_text="")
    writer.write(replace(report(1, math.nan), metrics={"task/loss": math.inf, "other/loss": 2.0}))
    writer.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["loss"] is None and record["metrics"] == {"task/loss": None, "other/loss": 2.0}
    truncate(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, start=0, tensorboard=False, config_text="")
    writer._file.close()
    # /dev/full refuses every byte with ENOSPC.
    writer._file = open("/dev/full", "a")  # noqa: SIM115
    writer.write(report(1))
    assert "metrics of step 1 were not written: [Errno 28]" in caplog.text


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L4", None),
    ],
)
def test_peaks(name: str, tera: float | None) -> None:
    assert peak_of(name) == (None if tera is None else tera * 1e12)


def test_the_cpu_has_memory_and_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert memory_bytes(torch.device("cpu")) > 10e6
