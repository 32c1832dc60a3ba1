"""A trained model on one device, from a checkpoint of any layout: for sampling and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from triptych import models
from triptych.models.config import ModelConfig
from triptych.models.lm import LanguageModel
from triptych.training import recovery, store
from triptych.training.shards import Window


def load_model(
    checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, ModelConfig, dict[str, Any]]:
    """The model of a checkpoint, its configuration and the checkpoint's state.json.

    checkpoint: one, or a run directory, whose newest valid one is taken. The model is in eval mode.
    Raises ValueError if there is no valid checkpoint.
    """
    directory = recovery.newest_in(checkpoint)
    state = store.load_state(directory)
    config = ModelConfig.model_validate(state["config"]["model"])
    with torch.device("meta"):
        model = models.build(config)
    model = model.to(dtype).to_empty(device=device).eval()
    with store.open_reader(directory) as reader:
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            reader.read_into(Window(f"model/{name}", parameter, shape, (0,) * len(shape)))
    return model, config, state
