"""What the tests of this room share: small models, and shards simulated by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from triptych import models
from triptych.models.sharding import Cut, Shards


def small_config(**overrides: Any) -> models.LanguageConfig:
    """A hybrid of two kinds of block, in sizes that are all different."""
    values: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_layers": 2,
        "pattern": ["mamba2", "attention"],
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "mamba2": {"state_size": 5, "head_dim": 6, "num_groups": 2, "chunk_size": 8},
        "ffn": {"intermediate_size": 40},
    }
    return models.LanguageConfig.model_validate(values | overrides)


def small_model(
    config: models.LanguageConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> models.LanguageModel:
    """Initialised; then every parameter is moved a little, so that none is 0 or 1 by construction."""
    model = models.build(config).to(dtype)
    models.initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def random_tokens(config: models.LanguageConfig, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class ThreadShards(Shards):
    """All-reduces between threads that each run one rank."""

    class Group:
        def __init__(self, count: int) -> None:
            self.barrier = threading.Barrier(count, timeout=30)
            self.slots: list[Any] = [None] * count

    def __init__(self, group: Group, rank: int, start: int = 0) -> None:
        self.group, self.rank, self.start = group, rank, start
        self.count = len(group.slots)

    def _exchange(self, x: torch.Tensor) -> torch.Tensor:
        self.group.slots[self.rank] = x
        self.group.barrier.wait()
        stacked = torch.stack(self.group.slots)
        self.group.barrier.wait()
        return stacked

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x).sum(0)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x).amax(0)


def on_ranks(count: int, work: Callable[[int, ThreadShards.Group], Any]) -> list[Any]:
    """[work(rank, group) for each rank], each in its own thread; the first error is raised."""
    group = ThreadShards.Group(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, group)
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def window_of(cut: Cut | None, shape: torch.Size, tp: int, rank: int) -> tuple[slice, ...]:
    """The rows and columns of a whole parameter that rank uses, as the words of models/sharding.py say."""
    whole = [slice(0, n) for n in shape]
    if cut is None or cut.kind in ("replicate", "row_bias", "experts", "expert_row_bias"):
        return tuple(whole)
    dim = {"row": 1, "expert_column": 1, "expert_row": 2}.get(cut.kind, 0)
    parts, part = tp, rank
    if cut.count is not None and tp > cut.count:
        assert tp % cut.count == 0
        parts, part = cut.count, rank // (tp // cut.count)
    size = shape[dim] // parts
    assert size * parts == shape[dim]
    whole[dim] = slice(part * size, (part + 1) * size)
    return tuple(whole)


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> nn.Parameter:
    """Replaces the (dotted) parameter."""
    owner, _, last = name.rpartition(".")
    parameter = nn.Parameter(value.detach().clone())
    setattr(module.get_submodule(owner), last, parameter)
    return parameter
