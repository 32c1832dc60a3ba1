"""Which part of the whole model each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Window:
    """A box in a whole tensor. shape may have a zero: ranks beyond the end of a short tensor hold nothing."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the window in the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape))


@dataclass(frozen=True)
class ShardInfo:
    """This rank's part of one parameter.

    name: of the whole model. tensor: the local part, sharing the parameter's storage; optimizer states of the
    parameter have the same window. is_writer: exactly one rank is the writer of each element.
    """

    name: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    is_writer: bool


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, or a plain tensor itself; detached, sharing storage."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def window(parameter: torch.Tensor) -> Window:
    """What this rank holds of a parameter, cut first over tp and then, within the tp part, over dp_shard.

    FSDP2 cuts like torch.chunk: parts of ceil(n / degree) rows, the last ones shorter or empty. A strided
    shard (tp and dp_shard both cut dim 0) is therefore contiguous in the whole.
    """
    offset, shape = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        for axis, placement in reversed(list(_axes(parameter))):
            if not placement.is_shard() and not hasattr(placement, "split_factor"):
                continue
            dim = placement.dim
            degree = parameter.device_mesh[axis].size()
            rank = parameter.device_mesh.get_local_rank(axis)
            part = -(-shape[dim] // degree)
            start = min(rank * part, shape[dim])
            offset[dim] += start
            shape[dim] = min(part, shape[dim] - start)
    return Window(tuple(offset), tuple(shape), tuple(parameter.shape))


def is_writer(parameter: torch.Tensor) -> bool:
    """Whether this rank, of those that hold the same elements, is the first."""
    if not isinstance(parameter, DTensor):
        return True
    return all(
        placement.is_shard()
        or hasattr(placement, "split_factor")
        or parameter.device_mesh.get_local_rank(axis) == 0
        for axis, placement in _axes(parameter)
    )


def _axes(parameter: DTensor) -> list[tuple[str, Shard]]:
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None, "build_mesh names its axes"
    return list(zip(names, parameter.placements))  # type: ignore[arg-type]
