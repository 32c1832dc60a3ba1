"""Whole runs through the command line: exit codes, torchrun, in-process, Ray, and faults."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from triptych.data_pipeline.indexed import IndexedWriter
from triptych.launcher import cli, processes
from triptych.launcher import config as configuration

PYTHON = [sys.executable, "-m", "triptych.launcher.cli"]
STEPS = 12

# Loaded by every Python process below: slows the steps down, and plants what the tests are about.
HOOKS = """
import builtins, os, sys, time
real = builtins.__import__
calls = 0

def patched(name, *arguments, **keywords):
    module = real(name, *arguments, **keywords)
    objectives = sys.modules.get("triptych.training.objectives")
    kind = getattr(objectives, "LanguageModeling", None)
    if kind is not None and not hasattr(kind, "patched"):
        kind.patched, original = True, kind.loss

        def loss(self, outputs, targets):
            global calls
            calls += 1
            time.sleep(float(os.environ.get("TEST_SLEEP", "0")))
            total, count, metrics = original(self, outputs, targets)
            if calls == 3 and os.environ.get("TEST_NAN_RANK", "none") == os.environ.get("RANK"):
                total = total * float("nan")
            return total, count, metrics

        kind.loss = loss
    return module

builtins.__import__ = patched
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus, a configuration for it (two tensor-parallel ranks) and the hooks."""
    place = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    for split in ("train", "valid"):
        with IndexedWriter(place / split, dtype=np.uint16) as writer:
            for length in generator.integers(20, 200, size=60):
                writer.add_document(generator.integers(0, 64, size=length))
    with IndexedWriter(place / "short", dtype=np.uint16) as writer:
        writer.add_document(np.arange(9))
    values = {
        "name": "test",
        "model": {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_layers": 2,
            "pattern": ["mamba2", "attention"],
            "attention": {"num_heads": 2},
            "mamba2": {"state_size": 4, "head_dim": 8, "num_groups": 2, "chunk_size": 8},
        },
        "data": {"sources": ["train"], "valid": ["valid"], "seq_len": 16},
        "parallel": {"tp": 2},
        "train": {
            "steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "eval_every": 6,
            "eval_samples": 4,
        },
        "checkpoint": {"every": 3},
        "log": {"tensorboard": False},
        "cluster": {"use_gpu": False, "max_failures": 3, "threads_per_worker": 1},
    }
    (place / "test.yaml").write_text(yaml.safe_dump(values))
    (place / "sitecustomize.py").write_text(HOOKS)
    return place


@pytest.fixture(scope="module")
def start(workplace: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command in the workplace, in a process group of its own; leaves nothing behind."""
    started: list[subprocess.Popen[str]] = []

    def popen(command: list[str], **variables: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(workplace), "OMP_NUM_THREADS": "1", **variables}
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            command,
            cwd=workplace,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell's background job, as CI may be one, hands SIGINT down as ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            left = processes.descendants(process.pid)
            process.kill()
            process.wait()
            processes.end(left, patience=0.0)


@pytest.fixture
def run(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., tuple[int, str]]:
    """Runs the command line to its end; returns (exit code, everything it wrote)."""

    def finish(*arguments: str, command: list[str] = PYTHON, **variables: str) -> tuple[int, str]:
        process = start([*command, *arguments], **variables)
        output, _ = process.communicate(timeout=170)
        return process.returncode, output

    return finish


@pytest.fixture(scope="module")
def undisturbed(workplace: Path, start: Callable[..., subprocess.Popen[str]]) -> dict[int, float]:
    """Losses by step of an undisturbed run under torchrun, two ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "triptych.launcher.worker", "test.yaml", "--run-dir", "undisturbed"]
    process = start([*torchrun, *worker])
    output, _ = process.communicate(timeout=170)
    assert process.returncode == 0, output
    assert f"step {STEPS}/{STEPS}" in output, "rank 0 shows its progress on the terminal"
    assert "rank 1 finished" in (workplace / "undisturbed" / "logs" / "rank-1.log").read_text()
    return losses(workplace / "undisturbed")


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = {record["step"]: record["loss"] for record in map(json.loads, lines)}
    assert sorted(found) == list(range(1, STEPS + 1)) and len(lines) == STEPS, "each step once"
    return found


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        for event in events(run_dir):
            if event["event"] == "step" and event["step"] >= step:
                return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pytest.fail(f"step {step} did not come")


def events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def say(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs the command line in this process, for what needs no other; returns (exit code, what it wrote)."""
    monkeypatch.chdir(workplace)

    def execute(*arguments: str) -> tuple[int, str]:
        code = cli.execute(list(arguments))
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return execute


class TestWithoutWorkers:
    """What the command line says before any process is started."""

    def test_help_is_quick_and_needs_no_torch(self) -> None:
        code = "import sys; from triptych.launcher import cli; assert 'torch' not in sys.modules; sys.exit(0)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_the_command_is_installed_as_a_module(self, run: Callable[..., tuple[int, str]]) -> None:
        code, output = run("train", "nowhere.yaml")
        assert code == 2 and output.startswith("error: no configuration at nowhere.yaml")

    @pytest.mark.parametrize(
        "verb", ["train", "describe", "data text", "verify", "sample", "evaluate", "compare", "doctor"]
    )
    def test_every_verb_shows_examples(self, say: Callable[..., tuple[int, str]], verb: str) -> None:
        code, output = say(*verb.split(), "--help")
        assert code == 0 and f"  triptych {verb}" in output

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "no CONFIG given"),
            (["nowhere.yaml"], "no configuration at nowhere.yaml"),
            (["test.yaml", "train.stpes=3"], "did you mean train.steps?"),
            (["test.yaml", "parallel.tp=3"], "parallel.tp=3 does not divide model.attention.num_heads=2"),
            (["test.yaml", "parallel.dp_shard=3"], "train.global_batch_size=4 is not a multiple"),
            (["test.yaml", "--in-process"], "--in-process runs one rank but the layout has 2"),
            (["test.yaml", "data.sources=[missing]"], "triptych data text"),
            (["test.yaml", "model.vocab_size=32"], "vocab_size=32"),
            (["test.yaml", "data.sources=[short]"], "source short has 9 tokens, fewer than one sample needs"),
            (["test.yaml", "data.valid=[short]"], "source short has 9 tokens, fewer than one sample needs"),
            (
                ["test.yaml", "data.sources=[train, {path: valid, weight: 1e-9}]"],
                "weight=1e-09 of source valid is below",
            ),
            (["test.yaml", "data.valid=null"], "train.eval_every=6 needs validation data"),
            (["--resume", "nowhere"], "there is no config.yaml"),
            (["--resume", "a", "--run-dir", "b"], "leave --run-dir out"),
            (["test.yaml", "--run-dir", "test.yaml"], "is a file"),
            (["test.yaml", "--no-such-option"], "No such option"),
        ],
    )
    def test_bad_input_is_told_and_exits_with_2(
        self, say: Callable[..., tuple[int, str]], workplace: Path, arguments: list[str], words: str
    ) -> None:
        code, output = say("train", *arguments)
        assert code == 2 and words in output, output
        assert "Traceback" not in output
        assert not (workplace / "runs").exists()

    def test_verify_takes_several_layouts_in_a_row(self, say: Callable[..., tuple[int, str]]) -> None:
        """The last is illegal, and is refused before any runs."""
        code, output = say("verify", "test.yaml", "--layouts", "tp2", "pp2,dp2", "tp3", "train.seed=1")
        assert code == 2 and "parallel.tp=3 does not divide" in output, output

    def test_the_printed_configuration_is_the_configuration(
        self, say: Callable[..., tuple[int, str]], workplace: Path
    ) -> None:
        code, output = say("train", "test.yaml", "train.optimizer.lr=3e-4", "--print-config")
        assert code == 0
        (workplace / "printed.yaml").write_text(output)
        expected = configuration.load(workplace / "test.yaml", ["train.optimizer.lr=3e-4"])
        assert configuration.load(workplace / "printed.yaml") == expected

    def test_a_dry_run_describes_and_starts_nothing(
        self, say: Callable[..., tuple[int, str]], workplace: Path
    ) -> None:
        code, output = say("train", "test.yaml", "--dry-run")
        assert code == 0 and "dry run: nothing was started" in output
        assert not (workplace / "runs").exists()

    def test_compare_lays_runs_side_by_side(
        self, say: Callable[..., tuple[int, str]], workplace: Path
    ) -> None:
        for name, loss in (("one", 5.0), ("other", 4.5)):
            (workplace / name).mkdir()
            record = {"step": 3, "loss": loss}
            (workplace / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        code, output = say("compare", "one", "other")
        assert code == 0 and "5.000000" in output and "4.500000" in output and "5.0e-01" in output
        code, output = say("compare", "one", "other", "--json")
        assert code == 0 and json.loads(output)["largest_difference"] == {"one": 0.0, "other": 0.5}
        code, output = say("compare", "one", "nowhere")
        assert code == 2 and output.startswith("error: nowhere is no run directory")

    def test_debug_shows_the_traceback(self, say: Callable[..., tuple[int, str]]) -> None:
        code, output = say("train", "nowhere.yaml", "--debug")
        assert code == 2 and "Traceback" in output


class TestOneProcess:
    def test_in_process_gives_the_losses_of_two_ranks(
        self, run: Callable[..., tuple[int, str]], workplace: Path, undisturbed: dict[int, float]
    ) -> None:
        code, output = run(
            "train", "test.yaml", "parallel.tp=1", "--in-process", "--run-dir", "alone", "--json"
        )
        assert code == 0, output
        result = json.loads(output.splitlines()[-1])
        assert result["step"] == STEPS and result["checkpoint"] == f"step-{STEPS:08d}"
        assert result["valid_loss"] > 0 and result["restarts"] == 0
        for step, loss in losses(workplace / "alone").items():
            assert loss == pytest.approx(undisturbed[step], rel=1e-5)
        code, output = run("train", "--resume", "alone", "--in-process")
        assert code == 0 and f"has all {STEPS} steps" in output

    def test_bad_input_that_only_the_worker_sees(
        self, say: Callable[..., tuple[int, str]], workplace: Path
    ) -> None:
        (workplace / "torn" / "checkpoints" / "step-00000003").mkdir(parents=True)
        code, output = say("train", "test.yaml", "parallel.tp=1", "--in-process", "--run-dir", "torn")
        assert code == 2 and "Traceback" not in output
        assert "error: no checkpoint is valid: " in output and "it was never finished" in output

    def test_a_defect_in_a_worker_shows_its_traceback(
        self, say: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from triptych.training import session

        monkeypatch.setattr(session, "build", lambda *arguments, **keywords: {}["a key"])
        code, output = say("train", "test.yaml", "parallel.tp=1", "--in-process", "--run-dir", "defect")
        assert code == 1 and "Traceback" in output and "error: KeyError: 'a key'" in output
        assert "a defect of triptych" in output

    def test_torchrun_with_another_number_of_processes(self, run: Callable[..., tuple[int, str]]) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        code, output = run("test.yaml", command=[*torchrun, "-m", "triptych.launcher.worker"])
        assert code != 0 and "error: rank 0: the layout has 2 ranks but 1 processes run" in output
        assert "error: rank 0: ValueError" not in output, "raised in __main__, and meant all the same"

    def test_the_worker_without_torchrun(self, run: Callable[..., tuple[int, str]]) -> None:
        code, output = run("test.yaml", command=[sys.executable, "-m", "triptych.launcher.worker"])
        assert code == 2 and "start this with torchrun" in output


class TestRay:
    def test_a_killed_worker_changes_no_loss(
        self,
        start: Callable[..., subprocess.Popen[str]],
        workplace: Path,
        undisturbed: dict[int, float],
    ) -> None:
        choice = random.Random()
        rank, step = choice.randrange(2), choice.randrange(1, STEPS - 1)
        print(f"killing rank {rank} at step {step}")
        process = start([*PYTHON, "train", "test.yaml", "--run-dir", "killed", "--json"], TEST_SLEEP="0.1")
        wait_for_step(process, workplace / "killed", step)
        log = (workplace / "killed" / "logs" / f"rank-{rank}.log").read_text()
        os.kill(int(re.findall(r"pid (\d+)", log)[-1]), signal.SIGKILL)
        output, _ = process.communicate(timeout=170)
        assert process.returncode == 0, output
        assert "WORKERS FAILED" in output and "RESTARTED (1 of 3)" in output
        assert json.loads(output.splitlines()[-1])["restarts"] == 1
        assert losses(workplace / "killed") == undisturbed

    def test_nan_on_one_rank_ends_the_run_without_a_retry(
        self, run: Callable[..., tuple[int, str]], workplace: Path
    ) -> None:
        changes = ["parallel.tp=1", "parallel.dp_shard=2", "train.max_skipped_steps=0"]
        code, output = run("train", "test.yaml", *changes, "--run-dir", "nan", TEST_NAN_RANK="1")
        assert code == 1, output
        assert "is not finite in step" in output and "it arose on data rank 1" in output
        assert "RESTARTED" not in output and "Traceback" not in output
        assert sum(event["event"] == "start" for event in events(workplace / "nan")) == 1
        failure = json.loads((workplace / "nan" / "failure.json").read_text())
        assert failure["type"] == "NonFiniteLoss" and "Traceback" in failure["traceback"]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130)])
    def test_ctrl_c_stops_everything_and_says_how_to_go_on(
        self,
        start: Callable[..., subprocess.Popen[str]],
        run: Callable[..., tuple[int, str]],
        workplace: Path,
        undisturbed: dict[int, float],
        number: signal.Signals,
        code: int,
    ) -> None:
        process = start([*PYTHON, "train", "test.yaml", "--run-dir", "stopped"], TEST_SLEEP="0.3")
        wait_for_step(process, workplace / "stopped", 5)
        below = processes.descendants(process.pid)
        assert len(below) > 3, "Ray's processes and two workers"
        began = time.monotonic()
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
        assert time.monotonic() - began < 20
        assert [pid for pid in below if processes.is_alive(pid)] == []
        assert "last checkpoint:" in output and "go on with: triptych train --resume" in output
        # Elsewhere, on another layout, the run goes on as if nothing had been.
        code, output = run("train", "--resume", "stopped", "parallel.tp=1", "--in-process")
        assert code == 0 and "parallel.tp" in output, output
        for step, loss in losses(workplace / "stopped").items():
            assert loss == pytest.approx(undisturbed[step], rel=1e-5)

    def test_more_workers_than_the_cluster_has(
        self,
        start: Callable[..., subprocess.Popen[str]],
        run: Callable[..., tuple[int, str]],
        workplace: Path,
    ) -> None:
        code = (
            "import ray, sys, tempfile\n"
            "ray.init(num_cpus=1, num_gpus=0, include_dashboard=False, object_store_memory=10**8,\n"
            "         _temp_dir=tempfile.mkdtemp(prefix='tt-', dir='/tmp'))\n"
            "print('ADDRESS', ray.get_runtime_context().gcs_address, flush=True)\n"
            "sys.stdin.read()\n"
        )
        cluster = start([sys.executable, "-c", code], RAY_AUTH_MODE="token")
        assert cluster.stdout is not None and cluster.stdin is not None
        address = next(line.split()[1] for line in cluster.stdout if line.startswith("ADDRESS"))
        arguments = ["--address", address, "--run-dir", "crowded"]
        exit_code, output = run("train", "test.yaml", *arguments, RAY_AUTH_MODE="token")
        assert exit_code == 2, output
        assert "the layout has 2 workers of 1 CPU each, but the cluster has room for 1" in output
        cluster.stdin.close()
        assert cluster.wait(timeout=60) == 0
