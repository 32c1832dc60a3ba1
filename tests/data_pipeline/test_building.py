"""The pool of tokenizing processes: order, faults, and that nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from triptych.data_pipeline.building import Processes

# Functions of the standard library, so that the processes have nothing of the tests to import.


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order(count: int) -> None:
    with Processes(count) as processes:
        assert list(processes.map(divmod, ((i, 3) for i in range(40)))) == [divmod(i, 3) for i in range(40)]


def test_errors_of_a_process_are_those_of_the_call() -> None:
    with Processes(2) as processes, pytest.raises(ZeroDivisionError):
        list(processes.map(divmod, [(1, 0)]))


def test_a_killed_process_is_reported() -> None:
    with (
        Processes(2) as processes,
        pytest.raises(RuntimeError, match=r"was killed, perhaps for memory; use fewer"),
    ):
        list(processes.map(os._exit, [(9,)]))


def test_no_process_outlives_a_killed_parent() -> None:
    code = (
        "from triptych.data_pipeline.building import Processes; import os, time\n"
        "with Processes(2) as p:\n"
        "    print(*set(p.map(os.getpid, [()] * 8)), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(_is_running, workers)):
        assert time.monotonic() < deadline, f"processes {workers} outlived their parent"
        time.sleep(0.05)
    parent.stdout.close()


def _is_running(pid: int) -> bool:
    """Whether the process still runs; a zombie that nobody has collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
