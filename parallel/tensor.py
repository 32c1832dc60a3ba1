"""Tensor and sequence parallelism, from the sharding tables that modules declare (models/sharding.py).

Parameters become DTensors on the tp axis. A module's forward sees plain local tensors: for its duration each
parameter of the module is exchanged for this rank's part. Collectives stand around the regions (mixers,
feed-forwards, embedding, head) only: without sequence parallelism a sum behind each region and, in backward,
one in front of it (Megatron-LM, arXiv 1909.08053); with it a gather in front and a reduce-scatter behind
(arXiv 2205.05198).

Forward is wrapped rather than hooked, so that what is wrapped later (recomputation) runs all of it again.

Shape legend: B batch, T length of the whole sequence, D channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from triptych.models.conditioning import Modulation
from triptych.models.context import Context
from triptych.models.dropout import Dropout
from triptych.models.norms import GatedRMSNorm
from triptych.models.sharding import REPLICATE, Cut, Shards
from triptych.models.vocabulary import Embedding, Head
from triptych.parallel.collectives import (
    Axis,
    all_reduce,
    gather_sequence,
    join_shards,
    scatter_sum,
    sum_in_backward,
    sum_partial,
)
from triptych.parallel.layout import cut_dim, declared_cuts
from triptych.parallel.regather import gather_sequence_twice

SEQUENCE_DIM = 1
VOCABULARY_DIM = -1


def apply_tensor_parallel(
    model: nn.Module,
    axis: Axis,
    *,
    sequence_parallel: bool = True,
    regather: bool = True,
    experts_aside: bool = False,
) -> None:
    """Cut a model, in place, over the axis; nothing on an axis of one.

    model: on the meta device, or holding whole values of which this rank's part is then kept. Without a mesh
    the axis serves to count: parameters become plain tensors of this rank's shapes, on the meta device.
    sequence_parallel: activations between regions are cut along T, which the axis divides.
    regather: backward gathers a region's input again instead of keeping it whole; off under full
    recomputation, where nothing is kept anyway.
    experts_aside: parameters stacked over experts are left to parallel/expert.py.
    """
    if axis.size == 1:
        return
    cuts = declared_cuts(model)
    regions = {name: module for name, module in model.named_modules() if getattr(module, "tp_region", False)}
    exits = [name for name, module in model.named_modules() if getattr(module, "sequence", "") == "exit"]
    for prefix, module in model.named_modules():
        # Behind an exit every rank computes the same of the whole sequence.
        partial = _within(prefix, regions) or (sequence_parallel and not _within(prefix, exits))
        _tell_shards(module, axis, sequence_parallel)
        if experts_aside and getattr(module, "expert_parallel", False):
            continue
        uses = {}
        for name, parameter in module.named_parameters(recurse=False):
            cut = cuts.get(f"{prefix}.{name}" if prefix else name, REPLICATE)
            uses[name] = use_of(cut, parameter, axis, partial)
            module._parameters[name] = _cut_parameter(parameter, uses[name], axis)
        if uses and axis.mesh is not None:
            module.forward = with_local_parameters(module, uses)
    for module in regions.values():
        module.forward = _region_forward(module, axis, sequence_parallel, regather)
    if sequence_parallel:
        for module in model.modules():
            if hasattr(module, "sequence"):
                module.forward = _sequence_forward(module, axis)


def _within(prefix: str, names: Iterable[str]) -> bool:
    """Whether a module is one of those named, or stands in one."""
    return any(prefix == name or prefix.startswith(f"{name}.") for name in names)


@dataclass(frozen=True)
class Use:
    """How a module uses its part of a parameter.

    dim: the dimension cut over the axis, None for a whole tensor. gradients: placements of the local
    gradient, one per axis that the parameter is placed on. rows: of a whole tensor, the (start, length) of
    dim 0 that this rank uses. factor: of what is used.
    """

    dim: int | None
    gradients: tuple[Placement, ...]
    rows: tuple[int, int] | None = None
    factor: float | None = None

    def local(self, parameter: DTensor) -> torch.Tensor:
        local = parameter.to_local(grad_placements=list(self.gradients))
        if self.rows is not None:
            local = local.narrow(0, *self.rows)
        return local if self.factor is None else local * self.factor


def use_of(cut: Cut, parameter: torch.Tensor, axis: Axis, partial: bool) -> Use:
    """partial: whole tensors get different gradients on the ranks, whose sum is the gradient."""
    dim = cut_dim(cut, axis.size)
    if dim is not None:
        return Use(dim, (Shard(dim),))
    gradient = (Partial() if partial else Replicate(),)
    if cut.count is not None:
        rows = parameter.shape[0] // cut.count
        return Use(None, gradient, rows=(axis.rank // (axis.size // cut.count) * rows, rows))
    if cut.kind in ("row_bias", "expert_row_bias"):
        return Use(None, gradient, factor=float(axis.rank == 0))
    return Use(None, gradient)


def _cut_parameter(parameter: nn.Parameter, use: Use, axis: Axis) -> nn.Parameter:
    local = parameter.detach()
    if use.dim is not None:
        assert local.shape[use.dim] % axis.size == 0, (
            f"Layout.check lets {tuple(local.shape)} pass over {axis.size}"
        )
        local = local.chunk(axis.size, use.dim)[axis.rank].contiguous()
    if axis.mesh is None:
        if use.rows is not None:
            local = local.narrow(0, *use.rows)
        return nn.Parameter(local, requires_grad=parameter.requires_grad)
    placement = Replicate() if use.dim is None else Shard(use.dim)
    whole = DTensor.from_local(
        local, axis.mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def with_local_parameters(module: nn.Module, uses: dict[str, Use]) -> Callable[..., Any]:
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _local_parameters(module, uses):
            return forward(*args, **kwargs)

    return wrapped


@contextmanager
def _local_parameters(module: nn.Module, uses: dict[str, Use]) -> Iterator[None]:
    parameters: dict[str, Any] = module._parameters
    kept = {name: parameters[name] for name in uses}
    for name, use in uses.items():
        parameters[name] = use.local(kept[name])
    try:
        yield
    finally:
        parameters.update(kept)


class _AxisShards(Shards):
    """The verbs of models/sharding.py over the tp axis."""

    def __init__(self, axis: Axis, start: int) -> None:
        self.axis = axis
        self.start = start
        self.count = axis.size

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x, self.axis)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x, self.axis, dist.ReduceOp.MAX)


def _tell_shards(module: nn.Module, axis: Axis, sequence_parallel: bool) -> None:
    """Tell the modules whose mathematics crosses shards which one they hold."""
    if isinstance(module, (Embedding, Head)):
        module.shards = _AxisShards(axis, start=axis.rank * (module.vocab_size // axis.size))
    elif isinstance(module, GatedRMSNorm) and axis.size > module.num_groups:
        module.shards = _AxisShards(axis, start=axis.rank // (axis.size // module.num_groups))
    elif getattr(module, "sums_inside", False) or getattr(module, "balanced", False):
        summing: Any = module
        summing.shards = _AxisShards(axis, start=axis.rank)
    elif (isinstance(module, Dropout) and module.cut == "heads") or (
        isinstance(module, Dropout | Modulation) and sequence_parallel
    ):
        module.shard_rank, module.shard_count = axis.rank, axis.size


def _region_forward(
    module: nn.Module, axis: Axis, sequence_parallel: bool, regather: bool
) -> Callable[..., Any]:
    """The region's forward between its collectives."""
    forward = module.forward
    is_embedding, is_head = isinstance(module, Embedding), isinstance(module, Head)
    reads_memory = getattr(module, "reads_memory", False) and not sequence_parallel

    @functools.wraps(forward)
    def wrapped(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_head and isinstance(kwargs.get("weight"), DTensor):
            kwargs["weight"] = kwargs["weight"].to_local()
        if reads_memory:
            args = tuple(_memory_summed_in_backward(value, axis) for value in args)
        if is_embedding:
            y = forward(x, *args, **kwargs)
        elif not sequence_parallel:
            y = forward(sum_in_backward(x, axis), *args, **kwargs)
        elif regather and x.requires_grad and torch.is_grad_enabled():
            with gather_sequence_twice(x, SEQUENCE_DIM, axis) as whole:
                y = forward(whole, *args, **kwargs)
        else:
            y = forward(gather_sequence(x, SEQUENCE_DIM, axis), *args, **kwargs)
        if is_head:
            # The cross-entropy, (B, T), is whole on every rank; logits, (B, T, V / tp), are joined.
            return join_shards(y, VOCABULARY_DIM, axis) if y.ndim == 3 else y
        return scatter_sum(y, SEQUENCE_DIM, axis) if sequence_parallel else sum_partial(y, axis)

    return wrapped


def _memory_summed_in_backward(value: Any, axis: Axis) -> Any:
    """A context whose memory, like a region's input, gets the sum of the ranks' gradients."""
    if not isinstance(value, Context) or value.memory is None:
        return value
    return dataclasses.replace(value, memory=sum_in_backward(value.memory, axis))


def _sequence_forward(module: nn.Module, axis: Axis) -> Callable[..., Any]:
    """The forward of a module that stands across or at an end of the cut stream, see models/sharding.py.

    Ranks compute the same and each takes its part, so that gradients of parameters are partial sums.
    """
    forward, place = module.forward, module.sequence

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if place in ("whole", "exit"):
            # Behind an exit the ranks compute the same, so that each has the whole gradient.
            gather = gather_sequence if place == "whole" else join_shards
            args = tuple(gather(value, SEQUENCE_DIM, axis) if _is_stream(value) else value for value in args)
        y = forward(*args, **kwargs)
        if place == "exit":
            return y
        if place == "leave":
            return join_shards(y, SEQUENCE_DIM, axis)
        return y.chunk(axis.size, SEQUENCE_DIM)[axis.rank]

    return wrapped


def _is_stream(value: Any) -> bool:
    """Of the arguments of a "whole" or "exit" module the floating (B, T, C) ones are cut; indices are not."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
