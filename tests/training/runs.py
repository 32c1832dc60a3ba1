"""Small runs that the tests of training share: a corpus, a hybrid model, sections that tests vary, faults.

Ranks in processes of their own load this file by its path, so it imports nothing from `tests`.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.indexed import IndexedWriter
from triptych.models.config import LanguageConfig
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import Layout
from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig
from triptych.training.errors import NonFiniteLoss
from triptych.training.metrics import StepReport
from triptych.training.objectives import Batch, LanguageModeling, Objective
from triptych.training.session import build

CPU = torch.device("cpu")
VOCAB = 32


@dataclass(frozen=True)
class Run:
    """The sections that training reads."""

    model: LanguageConfig
    data: DataConfig
    parallel: ParallelConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig


def write_corpus(directory: Path) -> None:
    """train and valid .bin/.idx of documents in which each token mostly follows from the one before."""
    random = np.random.default_rng(0)
    for split, documents in (("train", 60), ("valid", 12)):
        with IndexedWriter(directory / split, np.uint16) as writer:
            for _ in range(documents):
                tokens = np.cumsum(random.integers(1, 4, size=random.integers(5, 60))) % (VOCAB - 1)
                writer.add_document(np.append(tokens, VOCAB - 1).astype(np.uint16))


def make_run(corpus: Path, **changes: dict[str, Any]) -> Run:
    """A float64 hybrid of two blocks on the corpus; `changes` are laid over the sections."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_layers": 2,
            "pattern": "M*",
            "attention": {"num_heads": 2, "num_kv_heads": 2},
            # One group is copied to both tensor-parallel ranks, two key-value heads are cut.
            "mamba2": {"state_size": 4, "head_dim": 8, "num_groups": 1, "chunk_size": 8},
            # Nine rows per tensor-parallel rank: data sharding cuts them unevenly.
            "ffn": {"intermediate_size": 18},
        },
        "data": {
            "sources": [str(corpus / "train")],
            "valid": [str(corpus / "valid")],
            "seq_len": 16,
        },
        "parallel": {},
        "train": {
            "steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "precision": "fp64",
            "optimizer": {"lr": 0.01},
            "schedule": {"warmup": 2},
            "max_skipped_steps": 0,
        },
        "checkpoint": {},
        "log": {"tensorboard": False},
    }
    for section, values in changes.items():
        sections[section] = sections[section] | values
    return Run(
        model=LanguageConfig.model_validate(sections["model"]),
        data=DataConfig.model_validate(sections["data"]),
        parallel=ParallelConfig.model_validate(sections["parallel"]),
        train=TrainConfig.model_validate(sections["train"]),
        checkpoint=CheckpointConfig.model_validate(sections["checkpoint"]),
        log=LogConfig.model_validate(sections["log"]),
    )


def fit(
    run: Run, run_dir: Path, objective: Objective | None = None, restarted: bool = False
) -> list[StepReport]:
    """Run on this rank; rank 0's reports."""
    reports: list[StepReport] = []
    build(
        run, run_dir=run_dir, device=CPU, report=reports.append, objective=objective, restarted=restarted
    ).fit()
    return reports


class Stopped(RuntimeError):
    """What the tests end a run with."""


@dataclass
class Fault(LanguageModeling):
    """Something happens to one data rank in one step: it stops, is killed, or its loss becomes NaN."""

    what: str
    at: int
    dp_rank: int | None = None
    layout: Layout | None = None

    def _here(self) -> bool:
        if self.dp_rank is None:
            return True
        assert self.layout is not None
        return self.layout.dp_rank(dist.get_rank()) == self.dp_rank

    def prepare(self, batch: Batch, step: int, training: bool = True) -> tuple[Batch, Tensor]:
        self.hit = step == self.at and self._here()
        if self.hit and self.what == "stop":
            raise Stopped
        if self.hit and self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(batch, step, training)

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count, metrics = super().loss(outputs, targets)
        if self.hit and self.what == "nan":
            total = total * float("nan")
        return total, count, metrics


def checked_run(corpus: Path, **parallel: Any) -> Run:
    """The run of most tests; its six validation samples do not fill global batches of four."""
    return make_run(
        corpus,
        parallel=parallel,
        train={"eval_every": 3, "eval_samples": 6},
        checkpoint={"every": 2},
    )


def fit_ranks(corpus: Path, parallel: dict[str, Any], run_dir: Path, *fault: Any) -> list[StepReport] | str:
    """What each rank of a group does: `checked_run`, with a Fault's arguments if there is to be one.

    The reports, or what ended the run. Takes plain values: the ranks cannot unpickle classes of tests.
    """
    run = checked_run(corpus, **parallel)
    objective = None
    if fault:
        objective = Fault(*fault)
        objective.layout = Layout(run.parallel)
    try:
        return fit(run, run_dir, objective)
    except (Stopped, NonFiniteLoss) as error:
        return f"{type(error).__name__}: {error}"


def fit_changed(corpus: Path, run_dir: Path, changes: dict[str, dict[str, Any]]) -> list[StepReport]:
    """What each rank of a group does: `make_run` with changes."""
    return fit(make_run(corpus, **changes), run_dir)
