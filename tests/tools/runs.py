"""A small run that the tools' tests share. Ranks load this file by its path: it imports nothing of tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triptych.data_pipeline import TextCorpusOptions, build_text_corpus
from triptych.data_pipeline.config import DataConfig
from triptych.models import LanguageConfig
from triptych.parallel.config import ParallelConfig
from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig
from triptych.training.metrics import StepReport
from triptych.training.session import build

VOCABULARY = 300


@dataclass(frozen=True)
class Run:
    """The sections that the tools read."""

    model: LanguageConfig
    data: DataConfig
    parallel: ParallelConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig


def make_run(corpus: Path = Path("missing"), **changes: dict[str, Any]) -> Run:
    """A hybrid of four blocks with dropout; `changes` are laid over the sections."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 4,
            "pattern": ["mamba2", "attention+gelu"],
            "attention": {"num_heads": 4, "num_kv_heads": 2},
            "mamba2": {"state_size": 4, "head_dim": 4, "num_groups": 2, "chunk_size": 8},
            "ffn": {"intermediate_size": 24},
            "dropout": 0.1,
        },
        "data": {
            "sources": [str(corpus / "train")],
            "valid": [str(corpus / "valid")],
            "tokenizer": str(corpus / "tokenizer.json"),
            "seq_len": 16,
        },
        "parallel": {},
        "train": {
            "steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "optimizer": {"lr": 0.01},
            "eval_every": 6,
            "eval_samples": 6,
        },
    }
    for section, values in changes.items():
        sections[section] = sections[section] | values
    return Run(
        model=LanguageConfig.model_validate(sections["model"]),
        data=DataConfig.model_validate(sections["data"]),
        parallel=ParallelConfig.model_validate(sections["parallel"]),
        train=TrainConfig.model_validate(sections["train"]),
        checkpoint=CheckpointConfig(),
        log=LogConfig(tensorboard=False),
    )


def write_corpus(directory: Path) -> Path:
    """A corpus of short texts with its tokenizer, as `triptych data text` makes it; returns its directory."""
    texts = directory / "texts"
    texts.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * step) % 7} and más" for step in range(1, 30))
        (texts / f"{number:02}.txt").write_text(f"text {number}: {words}.\n", encoding="utf-8")
    options = TextCorpusOptions(
        source=(str(texts),),
        out=str(directory / "corpus"),
        vocab_size=VOCABULARY,
        valid_share=0.3,
        workers=1,
    )
    build_text_corpus(options)
    return directory / "corpus"


def train_on_ranks(
    corpus: Path, run_dir: Path, parallel: dict[str, Any], train: dict[str, Any]
) -> list[StepReport]:
    """Body of one rank: train to the end and leave a checkpoint in run_dir."""
    reports: list[StepReport] = []
    run = make_run(corpus, parallel=parallel, train=train)
    build(run, run_dir=run_dir, device=torch.device("cpu"), report=reports.append).fit()
    return reports
