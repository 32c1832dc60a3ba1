"""The words in which a module declares how its parameters may be cut over the tensor-parallel axis.

A module that owns parameters may carry an attribute `sharding: dict[str, Cut]`: the name of an own or a
dotted child parameter -> how it is cut. What stands in no table is replicated. Marks go with the table:

- `tp_region = True`: the module is a unit around which collectives stand. Its input is the whole sequence;
  mixers, feed-forwards and the embedding return a partial sum over the axis. A parameter inside a region
  that is not cut has a partial gradient on each rank.
- `self.shards`: the module's mathematics crosses shards; `parallel/tensor.py` puts in the real `Shards`.
- `sums_inside = True`: likewise, with sums over the axis amid the region (as in Mamba-1).

Outside the regions, under sequence parallelism, the stream between blocks is cut along T. A module there that
needs more than one token at a time, or stands at an end of the stream, carries `sequence`: "whole", its
inputs are gathered in front and its output cut behind; "enter", its output is cut; "leave", its output is
gathered.

Modules infer their local numbers of heads, groups, channels and rows from their parameters' shapes, so
one with cut weights needs to be told nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

CutKind = Literal["column", "row", "row_bias", "kv_heads", "groups", "vocab", "replicate"]


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut over tp ranks.

    column: dim 0 in tp equal parts. row: dim 1 in tp equal parts. vocab: dim 0, rows of the vocabulary.
    row_bias: the bias of a row-cut linear: whole, added by one rank only.
    kv_heads, groups: dim 0 in whole heads or groups, of which there are `count`; where tp > count the
    tensor is replicated, and rank r uses the rows of head or group r // (tp // count).
    """

    kind: CutKind
    count: int | None = None

    def __post_init__(self) -> None:
        counted = self.kind in ("kv_heads", "groups")
        assert counted == (self.count is not None), (
            f"Cut({self.kind!r}): kv_heads and groups alone have a count"
        )


COLUMN = Cut("column")
ROW = Cut("row")
ROW_BIAS = Cut("row_bias")
VOCAB = Cut("vocab")
REPLICATE = Cut("replicate")


class Shards:
    """Verbs of mathematics that crosses tensor-parallel shards; here those of one device, which do nothing.

    start: index of the first thing held of what is cut: rows of the vocabulary in Embedding and Head,
        normalisation groups in GatedRMSNorm (see there).
    count: number of shards.
    sum, max: all-reduce over the whole tp axis, outside autograd (callers own their backward); they return
        a new tensor, or x itself.
    """

    start: int = 0
    count: int = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of x over the shards; same shape and dtype on every shard."""
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of x over the shards; same shape and dtype on every shard."""
        return x
