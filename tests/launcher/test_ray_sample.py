"""Images drawn by Ray workers: the same as in one process, and a worker that dies is told."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.checkpoints import write_checkpoint
from triptych.launcher import errors, processes, ray_sample
from triptych.launcher.ray_sample import sample
from triptych.tools.image_drawer import Drawer, Job
from triptych.tools.images import Array

OPTIONS: dict[str, Any] = {"num": 11, "batch_size": 2, "sampler": {"steps": 2}}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


class Unlucky(Drawer):
    """Samples 6 and 7 kill the process that draws them, or are not finite."""

    how: str = "dies"

    def draw(self, numbers: range) -> Array:
        if 6 in numbers and self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if 6 in numbers:
            raise RuntimeError("2 of 2 images are not finite")
        return super().draw(numbers)


class Diverging(Unlucky):
    """Samples 6 and 7 are not finite."""

    how = "diverges"


def test_workers_draw_what_one_process_draws(run_dir: Path, tmp_path: Path) -> None:
    before = set(processes.descendants())
    alone = sample(run_dir, out=tmp_path / "alone", **OPTIONS)
    dealt = sample(run_dir, workers=2, out=tmp_path / "dealt", **OPTIONS)
    assert (alone.conditions["workers"], dealt.conditions["workers"]) == (1, 2)
    for name in ("arr_0", "arr_1"):
        expected, got = (np.load(report.files["samples"])[name] for report in (alone, dealt))
        # Batches of one size, so nothing rounds otherwise.
        np.testing.assert_array_equal(got, expected)
    assert expected.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert set(processes.descendants()) <= before, "Ray left processes behind"


def test_more_workers_than_batches(run_dir: Path, tmp_path: Path) -> None:
    report = sample(run_dir, workers=3, out=tmp_path, num=2, batch_size=1, sampler={"steps": 1})
    assert np.load(report.files["samples"])["arr_0"].shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("drawer", "words"),
    [
        (
            Unlucky,
            r"worker 1 died .*before samples [26] to [37] were drawn; nothing was written.*fewer --workers",
        ),
        (Diverging, r"worker 1 failed before samples 6 to 7 were drawn: 2 of 2 images are not finite"),
    ],
)
def test_a_worker_that_fails_is_told(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawer: type[Drawer], words: str
) -> None:
    before = set(processes.descendants())
    monkeypatch.setattr(ray_sample, "Worker", type("Worker", (ray_sample.Worker,), {"drawer": drawer}))
    with pytest.raises(errors.RunFailed, match=words) as raised:
        sample(run_dir, workers=2, out=tmp_path / "out", **OPTIONS)
    assert errors.exit_code(raised.value) == 1 and errors.is_meant(raised.value)
    assert not list((tmp_path / "out").iterdir())
    assert set(processes.descendants()) <= before, "Ray left processes behind"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"workers": 2, "device": "cuda:1"}, "--device cuda:1: each of several workers"),
        ({"workers": 2, "labels": [7]}, "not among the model's classes"),
    ],
)
def test_bad_options_start_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    def never(job: Job, workers: int) -> None:
        pytest.fail("a Ray was started")

    monkeypatch.setattr(ray_sample, "_fan_out", never)
    with pytest.raises(ValueError, match=words):
        sample(run_dir, **options)
