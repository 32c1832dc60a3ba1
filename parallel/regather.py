"""Sequence parallelism's second gather: backward keeps the shard of a region's input and gathers it again.

Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from triptych.parallel.collectives import Axis, all_gather, reduce_scatter


@contextmanager
def gather_sequence_twice(x: torch.Tensor, dim: int, axis: Axis) -> Iterator[torch.Tensor]:
    """Gives the gathered x; what autograd saves of it within the context is kept as the shard x.

    x: (B, T / tp, D) for dim 1, requires grad. The gathered tensor is (B, T, D), contiguous. Backward gathers
    it once for all its uses, and reduce-scatters its gradient.
    """
    kept = _KeptShard(x, dim, axis)
    whole = _GatherTwice.apply(x, dim, axis, kept)
    # The identity of the storage, for meta tensors too; it lives as long as `whole`, so as long as the hooks.
    kept.storage = whole.untyped_storage()._cdata
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        yield whole


@dataclass(frozen=True)
class _View:
    """A saved view of the gathered tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Other:
    """A saved tensor that has nothing to do with the gathered one, as the hooks around ours packed it."""

    packed: Any


class _KeptShard:
    """Hooks for saved tensors, chained to those around them, as autograd calls the innermost ones only."""

    def __init__(self, x: torch.Tensor, dim: int, axis: Axis) -> None:
        self.dim, self.axis = dim, axis
        self.storage = 0
        self.shard: torch.Tensor | None = x.detach()
        self.packed_shard: Any = None
        self.whole: torch.Tensor | None = None
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.outer_pack: Callable[[torch.Tensor], Any] = around[0] if around else _same
        self.outer_unpack: Callable[[Any], torch.Tensor] = around[1] if around else _same

    def pack(self, tensor: torch.Tensor) -> _View | _Other:
        if tensor.untyped_storage()._cdata != self.storage:
            return _Other(self.outer_pack(tensor))
        if self.shard is not None:
            self.packed_shard = self.outer_pack(self.shard)
            self.shard = None
        return _View(tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))

    def unpack(self, packed: _View | _Other) -> torch.Tensor:
        if isinstance(packed, _Other):
            return self.outer_unpack(packed.packed)
        if self.whole is None:
            self.whole = all_gather(self.outer_unpack(self.packed_shard), self.dim, self.axis)
        return self.whole.as_strided(packed.size, packed.stride, packed.offset)


def _same(x: Any) -> Any:
    return x


class _GatherTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis, kept: _KeptShard) -> torch.Tensor:
        ctx.dim, ctx.axis, ctx.kept = dim, axis, kept
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # All uses of the gathered tensor have been passed: it is needed no more.
        ctx.kept.whole = None
        return reduce_scatter(grads[0], ctx.dim, ctx.axis), None, None, None
