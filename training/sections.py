"""The sections of a run's configuration that training reads, whoever composes them."""

from __future__ import annotations

from typing import Any, Protocol

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.models import DiffusionConfig, LanguageConfig, VisionConfig
from triptych.parallel.config import ParallelConfig
from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig

_NAMES = ("model", "data", "parallel", "train", "checkpoint", "log")


class RunSections(Protocol):
    """What training needs of a run (launcher.config.RunConfig has it)."""

    @property
    def model(self) -> LanguageConfig | DiffusionConfig | VisionConfig:
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


def check_family(run: RunSections) -> None:
    """Raise ValueError where `data:` is of a kind that the family of models does not learn from."""
    if isinstance(run.data, DataConfig) and not isinstance(run.model, LanguageConfig):
        raise ValueError(
            f"data: is text (sources of tokens, seq_len) and model.family={run.model.family}; set data.kind: "
            "images, or model.family: lm"
        )
    if isinstance(run.data, ImageDataConfig) and isinstance(run.model, LanguageConfig):
        raise ValueError(
            f"data.kind=images does not serve model.family={run.model.family}; set model.family: diffusion "
            "or vision, or give text under data:"
        )


def patch_edge(model: DiffusionConfig | VisionConfig) -> int:
    """Pixels of a token's edge. Raises ValueError for patches that are no squares: the readers make
    squares."""
    patch = model.patch_size
    if isinstance(patch, int):
        return patch
    if len(patch) != 2 or patch[0] != patch[1]:
        raise ValueError(
            f"model.patch_size={list(patch)} with data.kind=images: images are read in square patches; "
            "give one number"
        )
    return patch[0]


def tokens_per_sample(run: RunSections) -> int:
    """T: the tokens of one row of a batch, the most where sizes differ.

    Raises ValueError as `check_family` does, and for sizes that model.patch_size does not divide.
    """
    check_family(run)
    if isinstance(run.data, DataConfig):
        return run.data.seq_len
    assert not isinstance(run.model, LanguageConfig), "refused by check_family"
    prefix = run.model.num_prefix_tokens if isinstance(run.model, VisionConfig) else 0
    return prefix + run.data.num_tokens(patch_edge(run.model))


def lengths(run: RunSections) -> list[int]:
    """Every T that a batch of the run may have, ascending; several with buckets."""
    longest = tokens_per_sample(run)
    if isinstance(run.data, DataConfig) or run.data.buckets is None:
        return [longest]
    model = run.model
    assert not isinstance(model, LanguageConfig), "refused by check_family"
    prefix = model.num_prefix_tokens if isinstance(model, VisionConfig) else 0
    patch = patch_edge(model)
    return sorted({prefix + height // patch * (width // patch) for _, height, width in run.data.shapes})
