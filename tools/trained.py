"""A trained model and what its run said of itself, for `sample` and `evaluate`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.kinds import read_config as read_data
from triptych.models import DiffusionConfig, LanguageConfig, LanguageModel, Model, VisionConfig
from triptych.training import recovery, store
from triptych.training.config import TrainConfig
from triptych.training.loading import load_model


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on one device, and the sections of the run that trained it."""

    module: Model
    model: LanguageConfig | DiffusionConfig | VisionConfig
    data: DataConfig | ImageDataConfig
    train: TrainConfig
    step: int
    """Optimizer steps behind it."""
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that the run trained in."""
        if self.train.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def family_of(path: str | Path) -> str:
    """model.family of the checkpoint `path`, or of the newest valid one of the run directory `path`.

    Raises ValueError when there is none.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"{path} does not exist; give a run directory or a checkpoint in it")
    state = store.load_state(recovery.newest_in(place))
    return str(state["config"]["model"].get("family", "lm"))


@dataclass(frozen=True)
class TrainedLanguageModel(Trained):
    """Likewise, of a language model."""

    module: LanguageModel
    model: LanguageConfig
    data: DataConfig


def load_language_model(path: str | Path, device: str) -> TrainedLanguageModel:
    """`load_trained` for what works on text alone. Raises ValueError for a model of another family."""
    found = load_trained(path, device)
    if not isinstance(found.model, LanguageConfig):
        raise ValueError(
            f"{path} is of model.family={found.model.family}, and this is for language models (family lm)"
        )
    fields: dict[str, Any] = vars(found)
    return TrainedLanguageModel(**fields)


def load_trained(path: str | Path, device: str, *, ema: bool | None = None) -> Trained:
    """The checkpoint `path`, or the newest valid one of the run directory `path`.

    ema: with the averages of the parameters; None: where there are any.
    Raises ValueError when there is none, and RuntimeError for a device that this machine has not got.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a run directory or a checkpoint in it")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device} was asked for, but PyTorch sees no CUDA device here; use cpu")
    # The dtype of parameters in every precision but fp64, to which fp32 values would be cast losslessly
    # anyway.
    module, model, state = load_model(path, place, torch.float32, ema)
    config = state["config"]
    if config["train"]["precision"] == "fp64":
        module, model, state = load_model(path, place, torch.float64, ema)
    return Trained(
        module=module,
        model=model,
        data=read_data(config["data"]),
        train=TrainConfig.model_validate(config["train"]),
        step=int(state["step"]),
        device=place,
    )
