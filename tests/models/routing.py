"""Routers and mixtures for tests, and a global batch between threads."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tests.models.common import ThreadShards
from triptych import models
from triptych.models.context import Context
from triptych.models.init import initialize
from triptych.models.moe_config import MoEConfig
from triptych.models.routers import Router
from triptych.models.sharding import GlobalBatch

HIDDEN = 12


class TasksConfig(models.ModelConfig):
    """A family that looks both ways and knows three tasks."""

    causal: ClassVar[bool] = False
    family: Literal["tasks"] = "tasks"

    @property
    def task_names(self) -> tuple[str, ...]:
        return ("red", "green", "blue")


def tasks_config(**overrides: Any) -> TasksConfig:
    values = {"hidden_size": HIDDEN, "num_layers": 2, "attention": {"num_heads": 2}}
    return TasksConfig.model_validate(values | {"pattern": ["attention+moe"]} | overrides)


def randomize(module: torch.nn.Module, seed: int = 0, scale: float = 0.5) -> None:
    """Values that are 0 nowhere by construction."""
    initialize(module, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * scale)


def build_router(num_experts: int = 6, seed: int = 0, **settings: Any) -> Router:
    """In training mode, float64, with random weights."""
    section = MoEConfig.model_validate({"num_experts": num_experts, **settings})
    router = Router(tasks_config(), section, 1, num_experts, "moe").double()
    randomize(router, seed)
    return router.train()


def tokens(B: int = 3, T: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_padding(B: int = 3, T: int = 7) -> torch.Tensor:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 5:] = True
    padding[B - 1, :2] = True
    return padding


def row_context(first: int = 0, rows: int = 3, **fields: Any) -> Context:
    """Of rows first, first + 1, ... of a batch: their keys and tasks."""
    numbers = torch.arange(first, first + rows)
    return Context(sample_keys=numbers + 77, tasks=numbers % 3, **fields)


class ThreadBatch(GlobalBatch):
    """A global batch of which each thread holds an equal part."""

    def __init__(self, group: ThreadShards.Group, rank: int) -> None:
        self.shards = ThreadShards(group, rank)
        self.count, self.rank = self.shards.count, rank

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.shards.sum(x)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.shards._exchange(x).flatten(0, 1)
