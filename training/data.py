"""The data of a run, for whichever family it trains."""

from __future__ import annotations

from typing import Any

from triptych.data_pipeline import loader
from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.images import dataset as images
from triptych.data_pipeline.images.needs import ImageNeeds, TaskNeeds
from triptych.data_pipeline.vocabulary import check_vocabulary
from triptych.models import DiffusionConfig, LanguageConfig, VisionConfig
from triptych.training.sections import RunSections, check_family, patch_edge


def open_training(run: RunSections) -> Any:
    """The training data, `sample(i)` for any i of its global order.

    Raises ValueError for files that cannot serve.
    """
    if isinstance(run.data, DataConfig):
        return loader.open_training(run.data, run.train.seed, _vocab_size(run))
    return images.open_training(
        run.data, run.train.seed, image_needs(run), global_batch_size=run.train.global_batch_size
    )


def open_validation(run: RunSections) -> Any:
    """The validation samples, at most train.eval_samples of them; None where data.valid is not set.

    Raises ValueError for files that cannot serve.
    """
    limit = run.train.eval_samples
    if isinstance(run.data, DataConfig):
        return loader.open_validation(run.data, limit=limit, vocab_size=_vocab_size(run))
    return images.open_validation(
        run.data, image_needs(run), limit=limit, global_batch_size=run.train.global_batch_size
    )


def check_data(run: RunSections) -> None:
    """Raise ValueError where `data:` does not go with the model; reads headers only."""
    check_sections(run)
    if isinstance(run.data, DataConfig):
        check_vocabulary(run.data, _vocab_size(run))


def check_sections(run: RunSections) -> None:
    """The part of `check_data` that reads no file."""
    check_family(run)
    if not isinstance(run.data, DataConfig):
        image_needs(run).check(run.data)


def image_needs(run: RunSections) -> ImageNeeds:
    """What the run's model asks of its images."""
    model = run.model
    if isinstance(model, VisionConfig):
        return _vision_needs(model)
    assert isinstance(model, DiffusionConfig), "refused by check_data"
    told = model.conditioning
    return ImageNeeds(
        channels=model.in_channels,
        size=None if model.position == "rope" else model.input_size,
        patch_size=model.patch_size,
        num_classes=told.num_classes if told.kind == "class" else None,
        text=(told.text_length, told.text_size) if told.kind == "text" else None,
    )


def _vision_needs(model: VisionConfig) -> ImageNeeds:
    tasks = {
        name: TaskNeeds(
            kind=task.kind,
            number=number,
            num_classes=task.num_classes,
            text=(task.text_length, task.text_size) if task.kind == "contrast" else None,
        )
        for number, (name, task) in enumerate(model.tasks.items())
    }
    return ImageNeeds(
        channels=model.in_channels,
        size=None if model.position == "rope" else model.input_size,
        patch_size=patch_edge(model),
        num_classes=None,
        text=None,
        tasks=tasks,
    )


def _vocab_size(run: RunSections) -> int:
    assert isinstance(run.model, LanguageConfig), "refused by check_data"
    return run.model.vocab_size
