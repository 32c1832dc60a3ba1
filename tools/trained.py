"""A trained model and what its run said of itself, for `sample` and `evaluate`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from triptych.data_pipeline.config import DataConfig
from triptych.models import LanguageModel, ModelConfig
from triptych.training.config import TrainConfig
from triptych.training.loading import load_model


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on one device, and the sections of the run that trained it."""

    module: LanguageModel
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    step: int
    """Optimizer steps behind it."""
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that the run trained in."""
        if self.train.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def load_trained(path: str | Path, device: str) -> Trained:
    """The checkpoint `path`, or the newest valid one of the run directory `path`.

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
    module, model, state = load_model(path, place, torch.float32)
    config = state["config"]
    if config["train"]["precision"] == "fp64":
        module, model, state = load_model(path, place, torch.float64)
    return Trained(
        module=module,
        model=model,
        data=DataConfig.model_validate(config["data"]),
        train=TrainConfig.model_validate(config["train"]),
        step=int(state["step"]),
        device=place,
    )
