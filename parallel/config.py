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
    """Reserved for expert parallelism; 1."""
    sequence_parallel: bool = True
    """Also cut the activations between mixers and feed-forwards along the sequence, over tp."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it: none; selective: the parts that each block kind
    names as cheap to compute and dear to keep; full: whole blocks."""

    @model_validator(mode="after")
    def _reserved(self) -> ParallelConfig:
        for key, what in (("cp", "context"), ("ep", "expert")):
            degree = getattr(self, key)
            if degree != 1:
                raise ValueError(
                    f"parallel.{key}={degree} is reserved: {what} parallelism is not built yet; use 1"
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

    def degree(self, axis: str) -> int:
        """Number of shards along one axis of the mesh."""
        return int(getattr(self, axis))
