"""What the tests of objectives and samplers share: small models, batches of whole and of packed images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.random import hash_bits, hash_normal
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.patches import patchify
from triptych.training.objectives.config import ObjectiveConfig

PATCH = 2

# One of each kind of output on each path that it goes with.
COMBINATIONS = [
    *((path, kind) for path in ("linear", "gvp", "vp") for kind in ("velocity", "noise", "score", "v", "x0")),
    *(("ddpm", kind) for kind in ("noise", "score", "v", "x0")),
    ("edm", "edm"),
]


def model_config(**changes: Any) -> DiffusionConfig:
    """A denoiser of 8 x 8 images with two channels and ten classes."""
    values = {
        "family": "diffusion",
        "hidden_size": 16,
        "num_layers": 4,
        "attention": {"num_heads": 2},
        "in_channels": 2,
        "input_size": 8,
        "patch_size": PATCH,
        "conditioning": {"kind": "class", "num_classes": 10},
    }
    return DiffusionConfig.model_validate(values | changes)


def objective_config(path: str = "linear", predict: str | None = None, **changes: Any) -> ObjectiveConfig:
    values = {"path": path} if predict is None else {"path": path, "predict": predict}
    return ObjectiveConfig.model_validate(values | changes)


def keys(count: int, seed: int = 0) -> Tensor:
    """Keys of `count` samples, in [0, 2^63) as those of the data pipeline."""
    return hash_bits(seed, torch.arange(count)) & (2**63 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64, no part of any stream of the objectives."""
    return hash_normal(seed + 10_000, torch.arange(int(torch.Size(shape).numel()))).view(shape)


def image_batch(count: int, size: tuple[int, ...] = (8, 8), seed: int = 0) -> dict[str, Any]:
    """Unit-Gaussian images (count, 2, *size) in float64 with labels 0, 1, ..."""
    return {
        "x": normal(seed, count, 2, *size),
        "labels": torch.arange(count) % 10,
        "valid": torch.ones(count, dtype=torch.bool),
        "sample_keys": keys(count, seed),
    }


def pack(batch: dict[str, Any], images: list[Tensor], rows: list[list[int]], length: int) -> dict[str, Any]:
    """The images (C, H, W) of the numbers in `rows`, packed into rows of `length` tokens; keys and labels are
    those of the numbers in `batch`."""
    places = max(map(len, rows))
    shape = (len(rows), places)
    packed = {
        "x": torch.zeros(len(rows), length, 2 * PATCH**2, dtype=torch.float64),
        "positions": torch.zeros(len(rows), length, 2, dtype=torch.int64),
        "document_ids": torch.full((len(rows), length), places),
        "sizes": torch.zeros(*shape, 2, dtype=torch.int64),
        "labels": torch.zeros(shape, dtype=torch.int64),
        "valid": torch.zeros(shape, dtype=torch.bool),
        "image_keys": torch.zeros(shape, dtype=torch.int64),
        "sample_keys": keys(len(rows), seed=77),
    }
    for row, numbers in enumerate(rows):
        start = 0
        for place, number in enumerate(numbers):
            tokens = patchify(images[number].unsqueeze(0), PATCH)[0]
            height, width = (size // PATCH for size in images[number].shape[1:])
            end = start + len(tokens)
            packed["x"][row, start:end] = tokens
            packed["document_ids"][row, start:end] = place
            packed["positions"][row, start:end, 0] = torch.arange(height).repeat_interleave(width)
            packed["positions"][row, start:end, 1] = torch.arange(width).repeat(height)
            packed["sizes"][row, place] = torch.tensor([height, width])
            for name, source in (("labels", "labels"), ("valid", "valid"), ("image_keys", "sample_keys")):
                packed[name][row, place] = batch[source][number]
            start = end
    return packed


def kolmogorov_smirnov(draws: Tensor, cumulative: Tensor) -> float:
    """sqrt(n) times the largest distance of the draws' distribution from the one whose distribution function
    is `cumulative` at the draws; above 1.95 once in a thousand."""
    order = draws.argsort()
    count = len(draws)
    exact = cumulative[order]
    above = (torch.arange(1, count + 1) / count - exact).max()
    below = (exact - torch.arange(count) / count).max()
    return float(torch.maximum(above, below)) * count**0.5
