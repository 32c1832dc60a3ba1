"""Small denoisers and what they are called with.

Shape legend: B rows, G images of a row, T tokens, P values of a patch, L tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from triptych import models
from triptych.models.positions import grid_positions


def denoiser_config(**overrides: Any) -> models.DiffusionConfig:
    """Two DiT blocks on 8 x 4 latents of 3 channels; sizes are all different. Sections merge key by key."""
    values: dict[str, Any] = {
        "family": "diffusion",
        "in_channels": 3,
        "input_size": [8, 4],
        "patch_size": 2,
        "hidden_size": 24,
        "num_layers": 2,
        "attention": {"num_heads": 3, "bias": True},
        "conditioning": {"kind": "class", "num_classes": 5},
    }
    for key, value in overrides.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return models.DiffusionConfig.model_validate(values)


def build_denoiser(
    config: models.DiffusionConfig, *, seed: int = 0, disturb: float = 0.1, dtype: torch.dtype = torch.float64
) -> models.DiffusionModel:
    """Initialised, in eval mode; then every parameter is moved by `disturb`, so that none is zero."""
    model = models.build(config).to(dtype)
    assert isinstance(model, models.DiffusionModel)
    models.initialize(model, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(disturb * noise.to(dtype))
    return model.eval()


def image_batch(
    config: models.DiffusionConfig, rows: int = 2, space: tuple[int, ...] | None = None, seed: int = 1
) -> dict[str, Any]:
    """Arguments of a forward pass over whole images, in float64."""
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, config.in_channels, *(space or config.input_size))
    batch: dict[str, Any] = {
        "x": torch.randn(shape, generator=draw, dtype=torch.float64),
        "times": 1000 * torch.rand(rows, generator=draw, dtype=torch.float64),
        "sample_keys": torch.randint(2**62, (rows,), generator=draw),
    }
    told = config.conditioning
    if told.kind == "class":
        batch["labels"] = torch.randint(told.num_classes + 1, (rows,), generator=draw)
    if told.kind == "text":
        size = (rows, told.text_length, told.text_size)
        batch["text"] = torch.randn(size, generator=draw, dtype=torch.float64)
    return batch


def packed_batch(
    config: models.DiffusionConfig,
    rows: Sequence[Sequence[tuple[int, ...]]],
    *,
    length: int,
    places: int,
    seed: int = 1,
) -> dict[str, Any]:
    """Arguments of a forward pass over packed rows, in float64.

    rows: the sizes in tokens of each row's images. length: T. places: G, images that a row may have.
    """
    draw = torch.Generator().manual_seed(seed)
    count, axes = len(rows), len(rows[0][0])
    values = config.in_channels * config.patch_elements
    x = torch.randn(count, length, values, generator=draw, dtype=torch.float64)
    positions = torch.zeros(count, length, axes, dtype=torch.int64)
    document_ids = torch.full((count, length), places)
    sizes = torch.zeros(count, places, axes, dtype=torch.int64)
    for row, images in enumerate(rows):
        start = 0
        for number, grid in enumerate(images):
            stop = start + math.prod(grid)
            document_ids[row, start:stop] = number
            positions[row, start:stop] = grid_positions(grid, torch.device("cpu"))[0]
            sizes[row, number] = torch.tensor(grid)
            start = stop
    batch: dict[str, Any] = {
        "x": x,
        "times": 1000 * torch.rand(count, places, generator=draw, dtype=torch.float64),
        "positions": positions,
        "document_ids": document_ids,
        "sizes": sizes,
        "sample_keys": torch.randint(2**62, (count,), generator=draw),
    }
    if config.conditioning.kind == "class":
        labels = (count, places)
        batch["labels"] = torch.randint(config.conditioning.num_classes + 1, labels, generator=draw)
    return batch


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Over the largest element expected."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} for {tuple(expected.shape)}"
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
