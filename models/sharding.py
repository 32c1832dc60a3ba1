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
gathered; "exit", its inputs are gathered and its output is whole on every rank.

Parameters stacked over experts, (E, ...), stand in modules with `expert_parallel = True`, which send rows to
the ranks that hold their experts by `self.exchange`. What needs sums over the global batch has `self.batch`.

Modules infer their local numbers of heads, groups, channels and rows from their parameters' shapes, so
one with cut weights needs to be told nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

CutKind = Literal[
    "column",
    "row",
    "row_bias",
    "kv_heads",
    "groups",
    "vocab",
    "replicate",
    "experts",
    "expert_column",
    "expert_row",
    "expert_row_bias",
]


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut over tp ranks.

    column: dim 0 in tp equal parts. row: dim 1 in tp equal parts. vocab: dim 0, rows of the vocabulary.
    row_bias: the bias of a row-cut linear: whole, added by one rank only.
    experts: dim 0, stacked experts, over ep alone. expert_column, expert_row: dim 0 likewise, and dim 1 or 2
    in tp equal parts. expert_row_bias: as experts, added by one tp rank only.
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
EXPERTS = Cut("experts")
EXPERT_COLUMN = Cut("expert_column")
EXPERT_ROW = Cut("expert_row")
EXPERT_ROW_BIAS = Cut("expert_row_bias")


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


class Sent(NamedTuple):
    """Rows where their experts are.

    rows: (M, C), sorted by the experts held. counts: int64 (experts held,). back: (M, D) -> (A, D), the
    experts' outputs to where the rows came from.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    back: Callable[[torch.Tensor], torch.Tensor]


class Exchange:
    """Sends rows to the ranks that hold their experts; on one device they stay. count: number of ranks."""

    count: int = 1
    rank: int = 0

    def there(self, rows_AC: torch.Tensor, counts_E: torch.Tensor) -> Sent:
        """rows: (A, C), sorted by expert, of which there are counts_E, int64 (E,)."""
        return Sent(rows_AC, counts_E, lambda rows: rows)


class GlobalBatch:
    """Verbs over the ranks that hold the other samples of a global batch; on one device they do nothing.

    rank, count: of this rank among them. All are outside autograd.
    """

    count: int = 1
    rank: int = 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of x over the ranks; same shape on each."""
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x of all ranks, of one shape, joined along dim 0 in the order of the samples."""
        return x
