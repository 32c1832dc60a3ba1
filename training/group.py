"""The ranks of a run as a small object that a single process can stand in for."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Group:
    """All ranks of the default process group, or one process where none was initialised."""

    def __init__(self) -> None:
        self._live = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._live else 0
        self.size = dist.get_world_size() if self._live else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of ranks, on every rank. All ranks must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank. All ranks must call it."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
