"""Checkpoints of experts, saved under one layout and resumed under another: no bit of the state differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.expert_runs import expert_run, resume_each, train_and_save, write_digits
from triptych.launcher.config import RunConfig
from triptych.parallel.local import run_local

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "ep2": {"dp_replicate": 2, "ep": 2},
    "ep2.dp_shard2": {"dp_shard": 2, "ep": 2},
    "ep4": {"dp_shard": 4, "ep": 4},
    "ep2.tp2": {"dp_replicate": 2, "ep": 2, "tp": 2},
    "ep2.pp2": {"dp_replicate": 2, "ep": 2, "pp": 2},
    # The axis on which experts are sharded besides is not one.
    "ep2.dp_shard4": {"dp_shard": 4, "ep": 2},
}
STEPS = 2
Saved = tuple[dict[str, Tensor], tuple[float, float]]


def run_under(data: Path, layout: str, precision: str, **checkpoint: Any) -> RunConfig:
    train = {"precision": precision, "ema": {"decay": 0.9}}
    return expert_run(data, parallel=LAYOUTS[layout], train=train, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Saved]]:
    """layout, precision -> run directory, the state that was saved, loss and norm of the step after."""
    found: dict[tuple[str, str], tuple[Path, Saved]] = {}

    def of(layout: str, precision: str) -> tuple[Path, Saved]:
        if (layout, precision) not in found:
            run_dir = tmp_path_factory.mktemp(layout)
            run = run_under(data, layout, precision)
            size = run.parallel.world_size
            ranks = run_local(size, train_and_save, run, run_dir, STEPS, timeout=100)
            found[layout, precision] = run_dir, ranks[0]
        return found[layout, precision]

    return of


def assert_resumes(
    data: Path,
    saved: Callable[[str, str], tuple[Path, Saved]],
    target: str,
    sources: list[str],
    precision: str,
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """State resumed is state saved, bit by bit; the pairs of the steps after."""
    runs = [run_under(data, target, precision, resume=str(saved(source, precision)[0])) for source in sources]
    run_dir = saved(target, precision)[0] / "resumed"
    resumed = run_local(runs[0].parallel.world_size, resume_each, runs, run_dir, timeout=150)[0]
    pairs = []
    for source, (state, after) in zip(sources, resumed, strict=True):
        expected, expected_after = saved(source, precision)[1]
        assert state.keys() == expected.keys(), source
        for name, tensor in expected.items():
            assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), (source, name)
        pairs.append((after, expected_after))
    return pairs


def test_what_is_saved_is_all_that_there_is(saved: Callable[[str, str], tuple[Path, Saved]]) -> None:
    """So that the comparisons below compare something."""
    state, _ = saved("single", "fp64")[1]
    experts, bias = "blocks.1.ffn.experts.up_proj", "blocks.1.ffn.router.expert_bias"
    names = (
        experts,
        f"optimizer/{experts}/exp_avg",
        f"optimizer/{experts}/exp_avg_sq",
        f"ema/{experts}",
        bias,
    )
    for name in names:
        assert float(state[name].abs().max()) > 0, name
    assert not any(bool(tensor.isnan().any()) for tensor in state.values())


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_resumes_every_other(
    data: Path, saved: Callable[[str, str], tuple[Path, Saved]], target: str
) -> None:
    pairs = assert_resumes(data, saved, target, list(LAYOUTS), "fp64")
    alone = saved("single", "fp64")[1][1]
    for after, expected in pairs:
        assert after == pytest.approx(expected, rel=1e-9)
        assert after == pytest.approx(alone, rel=1e-9)


def test_in_single_precision(data: Path, saved: Callable[[str, str], tuple[Path, Saved]]) -> None:
    for target, source in (("ep4", "ep2.tp2"), ("ep2.tp2", "ep4")):
        ((after, expected),) = assert_resumes(data, saved, target, [source], "fp32")
        assert after == pytest.approx(expected, rel=1e-4)
