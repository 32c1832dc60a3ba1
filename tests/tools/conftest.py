"""Fixtures of the tools' tests."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from triptych.parallel.local import run_local
from triptych.training.metrics import StepReport


def _load_runs() -> ModuleType:
    """tests/tools/runs.py, under a name that no other folder's `runs` has."""
    name = "tools_runs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "runs.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The module tests/tools/runs.py."""
    return _load_runs()


@dataclass(frozen=True)
class TrainedRun:
    """A run that two ranks trained under tp 2."""

    run_dir: Path
    corpus: Path
    reports: list[StepReport]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, runs: ModuleType) -> TrainedRun:
    directory = tmp_path_factory.mktemp("trained")
    corpus = runs.write_corpus(directory)
    run_dir = directory / "run"
    reports, _ = run_local(2, runs.train_on_ranks, corpus, run_dir, {"tp": 2}, {})
    return TrainedRun(run_dir, corpus, reports)
