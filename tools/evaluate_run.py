"""How good are a diffusion run's images? `triptych evaluate` of such a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from triptych import models
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.kinds import read_config as read_data
from triptych.models import DiffusionConfig
from triptych.tools.evaluate_images import ImageReport, compare_samples
from triptych.tools.image_metrics.classifier import load_or_train
from triptych.tools.image_metrics.data import data_images
from triptych.tools.image_metrics.features import Extractor
from triptych.tools.image_metrics.images import ImageSet
from triptych.tools.image_metrics.inception import Inception
from triptych.training import recovery, store

Progress = Callable[[str], None]
CLASSIFIER = "classifier"
"""Name of the extractor that is trained on the run's own images, and of its directory in the run's."""


def evaluate_run(
    path: str | Path,
    samples: str | Path,
    *,
    extractor: str = CLASSIFIER,
    reference: str | Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ImageReport:
    """Compare `samples` (an .npz or a directory of PNG), drawn from the run at `path`, with real images.

    extractor: "classifier", trained on the run's own training images (seconds) and kept in the run's
    directory; or "inception:FILE" with weights on disk. reference: an .npz or a directory; None: the
    run's validation images, or its training images without data.valid.
    Raises ValueError where the run, its data or the sets cannot serve.
    """
    config, directory = _read(path)
    real = _real(config, "valid" if config[1].valid else "train") if reference is None else reference
    return compare_samples(
        samples, real, build_extractor(extractor, config, directory, device, progress), progress=progress
    )


def build_extractor(
    name: str,
    config: tuple[DiffusionConfig, ImageDataConfig] | None,
    directory: Path | None,
    device: str,
    progress: Progress | None,
) -> Extractor:
    """The extractor of that name. Raises ValueError for an unknown one, or a classifier without labels."""
    kind, _, file = name.partition(":")
    if kind == "inception" and file:
        return Inception(file, device)
    if name != CLASSIFIER:
        raise ValueError(
            f"--extractor {name!r} is unknown; use {CLASSIFIER}, or inception:FILE with weights on disk"
        )
    if config is None or directory is None:
        raise ValueError(
            f"--extractor {CLASSIFIER} is trained on a run's images; give a run, or "
            "--extractor inception:FILE"
        )
    if config[0].conditioning.kind != "class":
        raise ValueError(
            f"--extractor {CLASSIFIER} needs labels, and the run has model.conditioning.kind="
            f"{config[0].conditioning.kind}; use inception:FILE"
        )
    real = _real(config, "train")
    assert real.labels is not None, "class conditioning has labels"
    return load_or_train(directory / CLASSIFIER, real.read(), real.labels, device=device, progress=progress)


def _real(config: tuple[DiffusionConfig, ImageDataConfig], split: Literal["train", "valid"]) -> ImageSet:
    """The run's own images, in the size that the model draws."""
    model, data = config
    height, width = model.input_size
    classes = model.conditioning.num_classes if model.conditioning.kind == "class" else None
    return data_images(data, (height, width), split=split, num_classes=classes)


def _read(path: str | Path) -> tuple[tuple[DiffusionConfig, ImageDataConfig], Path]:
    """Model, data and directory of the run that the checkpoint, or run directory, belongs to."""
    checkpoint = recovery.newest_in(Path(path).expanduser())
    sections = store.load_state(checkpoint)["config"]
    model, data = models.read_config(sections["model"]), read_data(sections["data"])
    if not isinstance(model, DiffusionConfig) or not isinstance(data, ImageDataConfig):
        raise ValueError(f"{path} is of model.family={model.family}, which draws no images")
    root = checkpoint.resolve().parent
    return (model, data), root.parent if root.name == recovery.CHECKPOINTS else root
