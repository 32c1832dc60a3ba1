"""Checkpoints of small denoisers that nobody trained: their weights are random, but not zero at the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from triptych import models
from triptych.data_pipeline.kinds import read_config as read_data
from triptych.training.checkpoint import Checkpointer
from triptych.training.config import CheckpointConfig, LogConfig, TrainConfig
from triptych.training.shards import Window

STEP = 30
CLASSES = 5


def sections(**changes: dict[str, Any]) -> dict[str, Any]:
    """A two-block DiT of grey 8 by 8 images in five classes; `changes` are laid over the sections."""
    plain: dict[str, dict[str, Any]] = {
        "model": {
            "family": "diffusion",
            "hidden_size": 16,
            "num_layers": 2,
            "attention": {"num_heads": 2},
            "in_channels": 1,
            "input_size": [8, 8],
            "patch_size": 4,
            "conditioning": {"kind": "class", "num_classes": CLASSES},
        },
        "data": {"kind": "images", "sources": ["nowhere"], "image_size": [8, 8], "channels": 1},
        "train": {"steps": STEP, "global_batch_size": 4, "micro_batch_size": 2, "ema": {"decay": 0.99}},
        "checkpoint": {},
        "log": {},
    }
    for section, values in changes.items():
        plain[section] = plain[section] | values
    return {
        "model": models.read_config(plain["model"]).model_dump(mode="json"),
        "data": read_data(plain["data"]).model_dump(mode="json"),
        "train": TrainConfig.model_validate(plain["train"]).model_dump(mode="json"),
        "checkpoint": CheckpointConfig.model_validate(plain["checkpoint"]).model_dump(mode="json"),
        "log": LogConfig.model_validate(plain["log"]).model_dump(mode="json"),
    }


def write_checkpoint(run_dir: Path, **changes: dict[str, Any]) -> Path:
    """A run directory with one checkpoint of `sections(**changes)`.

    The averages, if `train.ema` is set, are other weights than the parameters.
    """
    config = sections(**changes)
    model = models.build(models.read_config(config["model"]))
    weights = {"model": 1, "ema": 2} if config["train"]["ema"] else {"model": 1}
    windows = []
    for prefix, seed in weights.items():
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            values = 0.2 * torch.randn(shape, generator=generator)
            windows.append(Window(f"{prefix}/{name}", values, shape, (0,) * len(shape)))
    checkpointer = Checkpointer(run_dir / "checkpoints")
    checkpointer.save(STEP, windows, {"step": STEP, "config": config})
    checkpointer.wait()
    return run_dir
