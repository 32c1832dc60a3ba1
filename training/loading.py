"""A trained model on one device, from a checkpoint of any layout: for sampling and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from triptych import models
from triptych.models import DiffusionConfig, LanguageConfig, Model, VisionConfig
from triptych.training import recovery, store
from triptych.training.ema import PREFIX
from triptych.training.shards import Window


def load_model(
    checkpoint: Path, device: torch.device, dtype: torch.dtype, ema: bool | None = None
) -> tuple[Model, LanguageConfig | DiffusionConfig | VisionConfig, dict[str, Any]]:
    """The model of a checkpoint, its configuration and the checkpoint's state.json.

    checkpoint: one, or a run directory, whose newest valid one is taken. ema: with the averages of the
    parameters (True), with the parameters themselves (False), or with averages where there are any (None).
    The model is in eval mode. Raises ValueError if there is no valid checkpoint, or no averages in it.
    """
    directory = recovery.newest_in(checkpoint)
    state = store.load_state(directory)
    config = models.read_config(state["config"]["model"])
    prefix = PREFIX if averages_wanted(directory, ema) else "model/"
    with torch.device("meta"):
        model = models.build(config)
    model = model.to(dtype).to_empty(device=device).eval()
    with store.open_reader(directory) as reader:
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            reader.read_into(Window(prefix + name, parameter, shape, (0,) * len(shape)))
    return model, config, state


def averages_wanted(directory: Path, ema: bool | None) -> bool:
    """Whether `load_model` takes the averages of the checkpoint `directory`, given its argument `ema`.

    Raises ValueError where they are asked for and were not kept.
    """
    with store.open_reader(directory) as reader:
        present = any(name.startswith(PREFIX) for name in reader.index)
    if ema and not present:
        raise ValueError(
            f"checkpoint {directory} holds no averages of the parameters (EMA): its run had no train.ema; "
            "take the parameters themselves with --no-ema, or train with train.ema.decay=0.9999"
        )
    return present if ema is None else ema
