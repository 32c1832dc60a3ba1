"""Collectives over the tensor-parallel axis that autograd can go through, and their adjoints.

On meta tensors, and on an axis without a process group, they change shapes only, so that memory and FLOPs of
a sharded model can be counted in one process.

Shape legend: B batch, T length of the whole sequence, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 renames both, and warns of the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it; without a mesh, an axis to count with on the meta device."""

    size: int
    rank: int = 0
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Axis:
        """The axis of a one-dimensional (sub-)mesh."""
        return cls(size=mesh.size(), rank=mesh.get_local_rank(), mesh=mesh)

    @property
    def group(self) -> dist.ProcessGroup:
        assert self.mesh is not None, "an axis without a mesh has no processes: it serves meta tensors"
        return self.mesh.get_group()


def all_reduce(x: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """A new tensor, reduced over the axis; outside autograd."""
    if axis.size == 1 or x.is_meta:
        return x.detach()
    reduced = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=op, group=axis.group)
    return reduced


def all_gather(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """The shards of all ranks joined along dim; outside autograd."""
    if axis.size == 1:
        return x.detach()
    shard = x.detach().movedim(dim, 0).contiguous()
    whole = shard.new_empty(axis.size * shard.shape[0], *shard.shape[1:])
    if not x.is_meta:
        _ALL_GATHER(whole, shard, group=axis.group)
    return whole.movedim(0, dim).contiguous()


def reduce_scatter(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """This rank's shard along dim of the sum over ranks; outside autograd."""
    if axis.size == 1:
        return x.detach()
    assert x.shape[dim] % axis.size == 0, f"dim {dim} of {tuple(x.shape)} is not a multiple of {axis.size}"
    whole = x.detach().movedim(dim, 0).contiguous()
    shard = whole.new_empty(whole.shape[0] // axis.size, *whole.shape[1:])
    if not x.is_meta:
        _REDUCE_SCATTER(shard, whole, group=axis.group)
    return shard.movedim(0, dim).contiguous()


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.axis = dim, axis
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.dim, ctx.axis), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.axis = dim, axis
        return reduce_scatter(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.axis), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _SumInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grads[0], ctx.axis), None


class _JoinShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        ctx.dim, ctx.axis = dim, axis
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank].contiguous(), None, None


def gather_sequence(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """(B, T / tp, D) -> (B, T, D) for dim 1. Ranks use the whole differently: backward reduce-scatters."""
    return _GatherSequence.apply(x, dim, axis)


def scatter_sum(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """Partial sums (B, T, D) -> the rank's part (B, T / tp, D) of the sum for dim 1; backward gathers."""
    return _ScatterSum.apply(x, dim, axis)


def sum_partial(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Partial sums -> the sum, used by every rank in the same way: backward passes the gradient on."""
    return _Sum.apply(x, axis)


def sum_in_backward(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The same x on every rank, used by each differently: backward sums the gradients."""
    return _SumInBackward.apply(x, axis)


def join_shards(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """Shards along dim -> the whole, used by every rank in the same way: backward takes the own part."""
    return _JoinShards.apply(x, dim, axis)
