"""run_local: results by rank, the first real error, deaths and timeouts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from triptych.parallel.local import RankError

Distributed = Callable[..., list[Any]]


def add_ranks(offset: float) -> torch.Tensor:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return total + offset


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("parallel.tp=3 is wrong")
    dist.barrier()


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_on_one() -> int:
    if dist.get_rank() == 1:
        time.sleep(600)
    return os.getpid()


class OddError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("odd")


def fail_oddly() -> None:
    raise OddError(1, 2)


def read_environment(name: str) -> str | None:
    return os.environ.get(name)


def test_results_by_rank(distributed: Distributed) -> None:
    results = distributed(3, add_ranks, 0.5)
    assert [result.item() for result in results] == [3.5] * 3


def test_eight_ranks_start_quickly(distributed: Distributed) -> None:
    distributed(1, add_ranks, 0.0)
    start = time.monotonic()
    distributed(8, add_ranks, 0.0)
    # Under a second on an idle machine; the bound allows for a busy one.
    assert time.monotonic() - start < 10


def test_first_real_error_is_raised_with_its_traceback(distributed: Distributed) -> None:
    with pytest.raises(ValueError, match=r"parallel\.tp=3 is wrong") as caught:
        distributed(3, fail_on_one)
    assert isinstance(caught.value.__cause__, RankError)
    assert "in rank 1" in str(caught.value.__cause__) and "fail_on_one" in str(caught.value.__cause__)


def test_exception_that_cannot_be_pickled_keeps_its_traceback(distributed: Distributed) -> None:
    with pytest.raises(RankError, match="OddError: odd"):
        distributed(1, fail_oddly)


def test_death_of_a_rank_is_named(distributed: Distributed) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 died without a report \(signal 9\)"):
        distributed(2, die_on_one)


def test_timeout_kills_and_names_the_ranks(distributed: Distributed) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not finish in 2 s"):
        distributed(2, sleep_on_one, timeout=2)
    assert time.monotonic() - start < 20


def test_environment_of_the_caller_reaches_the_ranks(
    distributed: Distributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIPTYCH_TEST_VARIABLE", "seen")
    assert distributed(2, read_environment, "TRIPTYCH_TEST_VARIABLE") == ["seen", "seen"]
