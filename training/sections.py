"""The sections of a run's configuration that training reads, whoever composes them."""

from __future__ import annotations

from typing import Any, Protocol

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.models import DiffusionConfig, LanguageConfig
from triptych.parallel.config import ParallelConfig
from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig

_NAMES = ("model", "data", "parallel", "train", "checkpoint", "log")


class RunSections(Protocol):
    """What training needs of a run (launcher.config.RunConfig has it)."""

    @property
    def model(self) -> LanguageConfig | DiffusionConfig:
        """`model:`"""
        ...

    @property
    def data(self) -> DataConfig | ImageDataConfig:
        """`data:`"""
        ...

    @property
    def parallel(self) -> ParallelConfig:
        """`parallel:`"""
        ...

    @property
    def train(self) -> TrainConfig:
        """`train:`"""
        ...

    @property
    def checkpoint(self) -> CheckpointConfig:
        """`checkpoint:`"""
        ...

    @property
    def log(self) -> LogConfig:
        """`log:`"""
        ...


def as_json(run: RunSections) -> dict[str, Any]:
    """The resolved sections as JSON values."""
    return {name: getattr(run, name).model_dump(mode="json") for name in _NAMES}


def tokens_per_sample(run: RunSections) -> int:
    """T: the tokens of one row of a batch."""
    if isinstance(run.data, DataConfig):
        return run.data.seq_len
    if run.data.packing is not None:
        return run.data.packing.max_tokens
    assert isinstance(run.model, DiffusionConfig), "check() refuses images for other families"
    return run.model.num_tokens
