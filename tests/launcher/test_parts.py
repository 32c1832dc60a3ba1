"""The launcher's parts that need no run: placement, progress, run directory, errors, processes."""

from __future__ import annotations

import concurrent.futures.process
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from triptych.data_pipeline.config import SourceConfig
from triptych.data_pipeline.dataset import PackedDataset
from triptych.data_pipeline.indexed import IndexedWriter
from triptych.data_pipeline.loader import BatchLoader
from triptych.launcher import errors, processes, progress, ray_train, rundir
from triptych.launcher.config import load
from triptych.launcher.rundir import RunDir
from triptych.parallel import local
from triptych.training import store
from triptych.training.checkpoint import Checkpointer
from triptych.training.errors import NonFiniteLoss

NEEDS = {"CPU": 1.0}


class TestPlacement:
    def test_each_tensor_parallel_group_is_on_one_node(self) -> None:
        # The case of the facts: 5, 8 and 8 free GPUs, 16 workers in groups of 8.
        nodes = ray_train.place({"a": 5, "b": 8, "c": 8}, 16, 8, NEEDS)
        assert nodes == ["b"] * 8 + ["c"] * 8

    def test_a_node_is_filled_in_whole_groups(self) -> None:
        assert ray_train.place({"a": 3, "b": 3}, 4, 2, NEEDS) == ["a", "a", "b", "b"]

    def test_too_few_places_name_needed_and_available(self) -> None:
        with pytest.raises(ValueError, match="has 4 workers of 1 CPU each, but the cluster has room for 3"):
            ray_train.place({"a": 1, "b": 2}, 4, 1, NEEDS)

    def test_groups_that_fit_no_node(self) -> None:
        with pytest.raises(ValueError, match=r"parallel\.tp=4.*room for 3, 3 workers; lower parallel\.tp"):
            ray_train.place({"a": 3, "b": 3}, 4, 4, NEEDS)

    def test_gpus_are_the_scarce_resource(self) -> None:
        nodes: list[dict[str, Any]] = [
            {"NodeID": "a", "Resources": {"CPU": 64.0, "GPU": 2.0}},
            {"NodeID": "b", "Resources": {"CPU": 64.0}},
        ]
        needs = {"CPU": 8.0, "GPU": 1.0}
        capacities = ray_train.node_capacities(needs, nodes)
        assert capacities == {"a": 2, "b": 0}
        with pytest.raises(ValueError, match=r"4 workers of 8 CPU and 1 GPU.*cluster\.use_gpu=false"):
            ray_train.place(capacities, 4, 1, needs)

    def test_resources_that_others_hold_now(self) -> None:
        ray_train.check_free(NEEDS, 2, {"CPU": 2.0})
        with pytest.raises(ValueError, match="2 workers need 2 CPU, but 1 are free"):
            ray_train.check_free(NEEDS, 2, {"CPU": 1.0})

    def test_workers_placed_apart_are_noticed(self) -> None:
        from triptych.launcher.worker import check_nodes

        check_nodes([[0, 1], [2, 3]], ["a", "a", "b", "b"])
        with pytest.raises(errors.TopologyError, match="ranks 2, 3 exchange activations"):
            check_nodes([[0, 1], [2, 3]], ["a", "a", "a", "b"])


class TestProgress:
    STEP: ClassVar[dict[str, Any]] = {
        "event": "step",
        "step": 3,
        "loss": 5.25,
        "tokens_per_second": 1234.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "memory_bytes": 2**30,
        "mfu": None,
        "eta_seconds": 125.0,
    }

    def test_a_step_line_leaves_out_what_is_not_known(self) -> None:
        line = progress.step_line(self.STEP)
        assert line == "loss 5.2500  1,234 tok/s  lr 1.00e-03  grad 0.500  mem 1.00 GiB  eta 2m05s"
        assert "mfu 40.0%" in progress.step_line({**self.STEP, "mfu": 0.4})

    @pytest.mark.parametrize("terminal", [True, False])
    def test_restarts_and_warnings_are_told(self, terminal: bool) -> None:
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120, soft_wrap=True, highlight=False)
        start = {"event": "start", "world_size": 2, "device": "cpu", "step": 0}
        with progress.Display(9, max_failures=3, console=console) as display:
            display.show(start)
            display.show({**self.STEP, "valid_loss": 5.5})
            display.show({"event": "workers_failed", "text": "rank 1: [died]"})
            display.show({**start, "step": 2})
            display.show({"event": "warning", "text": "disk full"})
            display.show({**self.STEP, "step": 9, "skipped": True})
            display.show({"event": "of a later version"})
        text = out.getvalue()
        for words in ("2 workers on cpu", "validation loss 5.5", "WORKERS FAILED: rank 1: [died]"):
            assert words in text
        for words in ("RESTARTED (1 of 3)", "going on after step 2", "warning: disk full", "step 9 SKIPPED"):
            assert words in text
        assert display.starts == 2 and display.valid_loss == 5.5 and display.last["step"] == 9

    def test_a_tail_waits_for_whole_lines_and_skips_broken_ones(self, tmp_path: Path) -> None:
        path = tmp_path / "progress.jsonl"
        path.write_text('{"event": "of an earlier launch"}\n')
        tail = progress.Tail(path)
        with path.open("a") as file:
            file.write('{"a": 1}\n{"a": ')
            file.flush()
            assert tail.read() == [{"a": 1}]
            file.write('2}\n{"a": 3, \n{"a": 4}\n')
            file.flush()
            assert tail.read() == [{"a": 2}, {"a": 4}]
            assert tail.read() == []

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (7500, "2h05m"), (90000, "1d01h")]
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert progress.duration(seconds) == text


class TestRunDir:
    def test_configuration_versions_and_what_changed(self, tmp_path: Path) -> None:
        config = load("configs/lm/tiny.yaml")
        directory = RunDir(tmp_path / "run")
        with directory.locked():
            assert rundir.prepare(config, directory) == []
            assert load(directory.path) == config
            changed = rundir.prepare(
                load("configs/lm/tiny.yaml", ["train.steps=9", "parallel.tp=2"]), directory
            )
        assert changed == ["parallel.tp", "train.steps"]
        assert load(directory.path / "config-1.yaml") == config
        assert directory.launches() == 2
        start = directory.last_start()
        assert start["packages"]["torch"] and start["python"] and "git" in start
        json.dumps(start)

    def test_two_launchers_cannot_share_a_directory(self, tmp_path: Path) -> None:
        with (
            RunDir(tmp_path).locked(),
            pytest.raises(ValueError, match="another triptych is training in"),
            RunDir(tmp_path).locked(),
        ):
            pass
        with RunDir(tmp_path).locked():
            pass

    def test_only_the_first_failure_is_kept(self, tmp_path: Path) -> None:
        directory = RunDir(tmp_path)
        assert directory.failure() is None
        directory.record_failure(ValueError("the cause"), rank=1, exit_code=2)
        directory.record_failure(ValueError("a consequence"), rank=0, exit_code=1)
        failure = directory.failure()
        assert failure is not None
        assert (failure["message"], failure["rank"], failure["exit_code"]) == ("the cause", 1, 2)

    def test_a_start_counts_for_its_own_launch(self, tmp_path: Path) -> None:
        directory, config = RunDir(tmp_path), load("configs/lm/tiny.yaml")
        rundir.prepare(config, directory)
        assert not directory.was_started()
        directory.event("start", launch=directory.launches())
        assert directory.was_started()
        rundir.prepare(config, directory)
        assert not directory.was_started()

    def test_events_of_several_threads_stay_whole(self, tmp_path: Path) -> None:
        directory = RunDir(tmp_path)
        threads = [
            threading.Thread(target=lambda: [directory.event("x", text="y" * 999) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(directory.events())) == 200

    def test_the_plan_takes_a_fresh_name_and_creates_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        config = load("configs/lm/tiny.yaml")
        first = rundir.plan(config)
        assert first.path.parent == tmp_path / "runs" and first.path.name.startswith("tiny-")
        assert not first.path.exists()
        first.path.mkdir(parents=True)
        assert rundir.plan(config).path != first.path
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file"):
            rundir.plan(config, "file")


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "retryable"),
        [
            (RuntimeError("Connection closed by peer"), True),
            (OSError("Stale file handle"), True),
            (ValueError("parallel.tp=3"), False),
            (NonFiniteLoss(3, (1,), "loss", 0), False),
            (AssertionError("a defect"), False),
            (NotImplementedError("no such kernel"), False),
            (errors.TopologyError("apart"), False),
        ],
    )
    def test_only_what_a_restart_may_mend_is_retried(self, error: BaseException, retryable: bool) -> None:
        assert errors.is_retryable(error) is retryable

    def test_messages_for_people_are_those_that_we_raised(self) -> None:
        with pytest.raises(ValueError) as ours:
            load("nowhere.yaml")
        assert errors.is_meant(ours.value) and errors.exit_code(ours.value) == 2
        with pytest.raises(ValueError) as theirs:
            int("x")
        assert not errors.is_meant(theirs.value) and errors.exit_code(theirs.value) == 1
        # Our function, but the raise is that of an operator it calls.
        with pytest.raises(ValueError) as called:
            progress.duration(float("nan"))
        assert not errors.is_meant(called.value)

    def test_what_the_file_system_refuses_is_told_by_itself(self, tmp_path: Path) -> None:
        with pytest.raises(OSError) as refused:
            (tmp_path / "absent" / "file").write_text("")
        assert errors.is_meant(refused.value) and errors.exit_code(refused.value) == 1

    def test_a_token_outside_the_vocabulary_found_by_the_reading_thread(self, tmp_path: Path) -> None:
        with IndexedWriter(tmp_path / "corpus", dtype=np.uint16) as writer:
            writer.add_document(np.arange(40))
        dataset = PackedDataset([SourceConfig(path=str(tmp_path / "corpus"))], 16, 0, vocab_size=32)
        with BatchLoader(dataset, 2, 1) as loader, pytest.raises(ValueError, match="holds token") as caught:
            next(loader)
        assert errors.is_meant(caught.value) and errors.exit_code(caught.value) == 2

    def test_no_valid_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "step-00000003").mkdir()
        with pytest.raises(ValueError, match="no checkpoint is valid") as caught:
            store.find_latest(tmp_path)
        assert errors.is_meant(caught.value) and errors.exit_code(caught.value) == 2

    def test_a_checkpoint_that_cannot_be_written(self, tmp_path: Path) -> None:
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(3, [], {"no JSON": object()})
        with pytest.raises(RuntimeError, match="saving step 3 failed: rank 0: TypeError") as caught:
            checkpointer.wait()
        assert errors.is_meant(caught.value) and errors.exit_code(caught.value) == 1
        assert not errors.is_retryable(caught.value), "what fails without a fault of the machine fails again"

    @pytest.mark.parametrize(
        ("raises", "meant"), [(lambda: load("nowhere.yaml"), True), (lambda: int("x"), False)]
    )
    def test_errors_of_other_processes_keep_their_meaning(
        self, raises: Callable[[], Any], meant: bool
    ) -> None:
        def from_pool(error: Exception) -> None:
            sent = pickle.dumps(
                concurrent.futures.process._ExceptionWithTraceback(error, error.__traceback__)
            )
            raise pickle.loads(sent)

        def from_rank(error: Exception) -> None:
            local._raise_from(local._Report(0, 0.0, None, pickle.dumps(error), traceback.format_exc()))

        for resend in (from_pool, from_rank):
            with pytest.raises(ValueError) as caught:
                try:
                    raises()
                except ValueError as error:
                    resend(error)
            assert errors.is_meant(caught.value) is meant


class TestProcesses:
    def test_descendants_are_found_and_ended(self) -> None:
        code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        child = subprocess.Popen([sys.executable, "-c", code])
        try:
            found: list[processes.Process] = []
            for _ in range(200):
                found = processes.descendants(child.pid)
                if found:
                    break
                child.poll()
                threading.Event().wait(0.05)
            assert len(found) == 1
            assert child.pid in [pid for pid, _ in processes.descendants()]
            processes.end(found, patience=0.1)
            assert child.wait(timeout=20) is not None
            assert not processes.is_alive(found[0])
        finally:
            child.kill()
            child.wait()

    def test_a_pid_used_again_is_another_process(self) -> None:
        assert not processes.is_alive((os.getpid(), "0"))


class TestWorkerLogs:
    def test_warnings_reach_the_terminal_and_all_records_the_file(self, tmp_path: Path) -> None:
        from triptych.launcher.worker import _logged

        directory = RunDir(tmp_path)
        log = logging.getLogger("triptych.training.checkpoint")
        with _logged(directory, 1):
            log.info("quiet")
            log.warning("CHECKPOINT NOT USABLE")
        log.warning("afterwards")
        text = directory.rank_log(1).read_text()
        assert "quiet" in text and "NOT USABLE" in text and "afterwards" not in text
        assert [event["text"] for event in directory.events()] == ["rank 1: CHECKPOINT NOT USABLE"]
