"""What a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import torch

from triptych.training.shards import Window
from triptych.training.store import open_reader


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, in float64."""
    with open_reader(directory) as reader:
        found = {name: torch.empty(entry.shape, dtype=torch.float64) for name, entry in reader.index.items()}
        for name, tensor in found.items():
            reader.read_into(Window(name, tensor, tuple(tensor.shape), (0,) * tensor.ndim))
    return found
