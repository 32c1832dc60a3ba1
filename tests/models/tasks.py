"""What the tests of heads, objectives and meters share: models with several tasks, initialised heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from triptych import models
from triptych.models.heads import Heads
from triptych.models.vision_config import VisionConfig

TASKS: dict[str, dict[str, Any]] = {
    "digits": {"kind": "classify", "num_classes": 7},
    "shapes": {"kind": "segment", "num_classes": 4, "hidden_size": 6},
    "boxes": {"kind": "detect", "num_classes": 3, "hidden_size": 5},
    "captions": {"kind": "contrast", "embed_size": 6, "text_size": 5, "text_length": 3},
}
STAGES = [{"depth": 1, "hidden_size": 8 * size, "attention": {"num_heads": size}} for size in (1, 2, 4)]


def vision_config(tasks: tuple[str, ...] = tuple(TASKS), **changes: Any) -> VisionConfig:
    """A model of images of 16 x 24 pixels in 2 x 3 tokens, with these of the four tasks."""
    values: dict[str, Any] = {
        "family": "vision",
        "hidden_size": 16,
        "num_layers": 1,
        "attention": {"num_heads": 2},
        "in_channels": 1,
        "input_size": [16, 24],
        "patch_size": 8,
        "tasks": {name: TASKS[name] for name in tasks},
    }
    return VisionConfig.model_validate(values | changes)


def staged_config(tasks: tuple[str, ...] = tuple(TASKS), **changes: Any) -> VisionConfig:
    """A hierarchical one of 16 x 32 pixels, with grids of 8 x 16, 4 x 8 and 2 x 4 tokens."""
    values = {
        "family": "vision",
        "stages": STAGES,
        "in_channels": 1,
        "input_size": [16, 32],
        "patch_size": 2,
        "tasks": {name: TASKS[name] for name in tasks},
    }
    return VisionConfig.model_validate(values | changes)


def initialised(module: nn.Module, dtype: torch.dtype = torch.float64, moved: float = 0.1) -> Any:
    """With initial values, every parameter moved a little, so that none is 0 or 1 by construction."""
    module = module.to(dtype)
    models.initialize(module, seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(dtype) * moved)
    return module


def heads_of(config: VisionConfig, dtype: torch.dtype = torch.float64, moved: float = 0.1) -> Heads:
    heads: Heads = initialised(Heads(config), dtype, moved)
    return heads


def features_of(config: VisionConfig, rows: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
    """Random tokens of the last stage, of the earlier ones, and the last stage's grid."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for number, stage in enumerate(config.stage_configs):
        count = torch.Size(config.grid_of(number)).numel() + config.num_prefix_tokens
        shape = (rows, count, stage.hidden_size)
        tokens.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    return tokens[-1], tokens[:-1], config.grid_of(len(tokens) - 1)


def texts(rows: int, seed: int = 2) -> torch.Tensor:
    """Embedded texts (rows, 3, 5) in float32."""
    return torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(seed))
