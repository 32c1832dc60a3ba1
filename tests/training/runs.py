"""Small runs that the tests of training share: a corpus, a hybrid model, and sections that tests vary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.indexed import IndexedWriter
from triptych.models.config import ModelConfig
from triptych.parallel.config import ParallelConfig
from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig
from triptych.training.metrics import StepReport
from triptych.training.objectives import Objective
from triptych.training.session import build

CPU = torch.device("cpu")
VOCAB = 32


@dataclass(frozen=True)
class Run:
    """The sections that training reads."""

    model: ModelConfig
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
            "mamba2": {"state_size": 4, "head_dim": 8, "num_groups": 2, "chunk_size": 8},
            "ffn": {"intermediate_size": 16},
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
        },
        "checkpoint": {},
        "log": {"tensorboard": False},
    }
    for section, values in changes.items():
        sections[section] = sections[section] | values
    return Run(
        model=ModelConfig.model_validate(sections["model"]),
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
