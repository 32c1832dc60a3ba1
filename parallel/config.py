"""Section `parallel:` of a run's configuration: degrees of the axes, and what backward computes again."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the device mesh, outermost first: neighbouring ranks differ in tp."""

Recompute = Literal["none", "selective", "full"]


class ParallelConfig(BaseModel):
    """How many shards there are along each axis. Nothing here changes a run's losses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dp_replicate: int = Field(1, ge=1)
    """Groups of ranks that each hold all the parameters (HSDP); gradients are summed over them."""
    dp_shard: int = Field(1, ge=1)
    """Ranks that share parameters, gradients and optimizer states of one replica (FSDP2)."""
    tp: int = Field(1, ge=1)
    """Ranks among which heads, groups, feed-forward channels and vocabulary are cut; they share a node."""
    pp: int = Field(1, ge=1)
    """Pipeline stages."""
    cp: int = Field(1, ge=1)
    """Reserved for context parallelism; 1."""
    ep: int = Field(1, ge=1)
    """Ranks among which the experts of a layer are divided. They are data ranks, neighbours in dp_shard and
    then in dp_replicate, so ep takes no ranks of its own; what remains of dp_shard shards each expert."""
    sequence_parallel: bool = True
    """Also cut the activations between mixers and feed-forwards along the sequence, over tp."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it: none; selective: the parts that each block kind
    names as cheap to compute and dear to keep; full: whole blocks."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.cp != 1:
            raise ValueError(
                f"parallel.cp={self.cp} is reserved: context parallelism is not built yet; use 1"
            )
        within = self.dp_shard % self.ep == 0
        across = self.ep % self.dp_shard == 0 and self.dp_replicate % (self.ep // self.dp_shard) == 0
        if not (within or across):
            fitting = [n for n in range(1, self.dp + 1) if self.dp_shard % n == 0 or n % self.dp_shard == 0]
            fitting = [n for n in fitting if self.dp % n == 0]
            raise ValueError(
                f"parallel.ep={self.ep} is folded over the {self.dp} data ranks (dp_replicate="
                f"{self.dp_replicate} * dp_shard={self.dp_shard}) and does not divide them; use one of "
                f"{', '.join(map(str, fitting))}, or more data ranks"
            )
        return self

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.degree(axis) for axis in AXES)

    @property
    def dp(self) -> int:
        """Ranks among which a global batch is divided."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_shard(self) -> int:
        """Ranks that share each expert's parameters (FSDP2): what ep leaves of dp_shard."""
        return max(1, self.dp_shard // self.ep)

    @property
    def expert_replicate(self) -> int:
        """Groups of ranks that each hold all the experts."""
        return self.dp // (self.ep * self.expert_shard)

    def degree(self, axis: str) -> int:
        """Number of shards along one axis of the mesh."""
        return int(getattr(self, axis))
