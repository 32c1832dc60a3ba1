"""A small multi-task vision run with experts. Ranks load this file by its path: it imports nothing of
tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from triptych import models
from triptych.launcher.config import RunConfig, load
from triptych.training.checkpoint import Checkpointer
from triptych.training.metrics import StepReport
from triptych.training.sections import as_json
from triptych.training.session import build
from triptych.training.shards import Window

STEP = 20
EXPERTS = 6
"""Of the feed-forwards."""
HEADS = 4
"""Experts of the attention."""


def vision_run(shards: Path, model: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """A ViT of 8 x 8 images that classifies and segments: an attention_moe in block 0, a moe in block 1."""
    whole: dict[str, Any] = {
        "family": "vision",
        "in_channels": 1,
        "input_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_layers": 2,
        "pattern": ["attention_moe+gelu", "attention+moe"],
        "attention": {"num_heads": 2, "rope_theta": None},
        "attention_moe": {"num_experts": HEADS, "top_k": 2, "head_dim": 8, "bias": True},
        "ffn": {"intermediate_size": 24},
        "moe": {
            "num_experts": EXPERTS,
            "top_k": 2,
            "per_task": True,
            "expert": {"kind": "swiglu", "intermediate_size": 12, "bias": True},
            "losses": {"mutual_information": 0.01},
        },
        "init_std": 0.3,
        "task_embedding": True,
        "task_weighting": "uncertainty",
        "tasks": {
            "digits": {"kind": "classify", "num_classes": 5},
            "parts": {"kind": "segment", "num_classes": 3, "hidden_size": 8},
        },
    }
    return RunConfig.model_validate(
        {
            "name": "experts",
            "model": whole | (model or {}),
            "data": {
                "kind": "images",
                "sources": [{"path": str(shards / task), "task": task} for task in ("digits", "parts")],
                "valid": [{"path": str(shards / task), "task": task} for task in ("digits", "parts")],
                "image_size": 8,
                "channels": 1,
            },
            "train": {
                "steps": STEP,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "ema": {"decay": 0.9},
                "optimizer": {"lr": 0.01, "weight_decay": 0.1},
                "tasks": {"digits": {"weight": 2.0}},
            },
            "log": {"tensorboard": False},
            "cluster": {"use_gpu": False},
            **sections,
        }
    )


def write_run(run: RunConfig, run_dir: Path) -> Path:
    """A run directory with one checkpoint of random weights, whose averages are others.

    Gates are large, and so is what norms add, so that tokens have experts that most of them prefer.
    """
    model = models.build(run.model)
    dtype = torch.float64 if run.train.precision == "fp64" else torch.float32
    windows = []
    for prefix, seed in {"model": 1, **({"ema": 2} if run.train.ema else {})}.items():
        models.initialize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            scale = 1.5 if ".router." in name else 3.0 if name.endswith("norm.bias") else 0.1
            moved = parameter.detach().double() + scale * torch.randn(parameter.shape, generator=generator)
            shape = tuple(parameter.shape)
            windows.append(Window(f"{prefix}/{name}", moved.to(dtype), shape, (0,) * len(shape)))
    checkpointer = Checkpointer(run_dir / "checkpoints")
    checkpointer.save(STEP, windows, {"step": STEP, "tokens": 0, "seed": 0, "config": as_json(run)})
    checkpointer.wait()
    return run_dir


def fit_config(config: Path, overrides: list[str], run_dir: Path) -> list[StepReport]:
    """Body of a rank: train what a configuration says."""
    reports: list[StepReport] = []
    run = load(config, overrides)
    build(run, run_dir=run_dir, device=torch.device("cpu"), report=reports.append).fit()
    return reports
