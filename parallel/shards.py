"""Which part of the whole model each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor


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
    for cut in reversed(_cuts(parameter)):
        if cut.dim is None:
            continue
        part = -(-shape[cut.dim] // cut.degree)
        start = min(cut.rank * part, shape[cut.dim])
        offset[cut.dim] += start
        shape[cut.dim] = min(part, shape[cut.dim] - start)
    return Window(tuple(offset), tuple(shape), tuple(parameter.shape))


def is_writer(parameter: torch.Tensor) -> bool:
    """Whether this rank, of those that hold the same elements, is the first."""
    return all(cut.dim is not None or cut.rank == 0 for cut in _cuts(parameter))


class _Cut(NamedTuple):
    """What one axis of the mesh does to a parameter: cut dim `dim`, or copy (None)."""

    dim: int | None
    degree: int
    rank: int


def _cuts(parameter: torch.Tensor) -> list[_Cut]:
    """Per axis, outermost first; none for a tensor of this rank alone."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    place = mesh.get_coordinate()
    assert place is not None, "a rank holds parameters of its own mesh only"
    # FSDP2's strided shard is no Shard in every release; like one, it has a dim.
    dims = [getattr(placement, "dim", None) for placement in parameter.placements]
    return [_Cut(dim, mesh.size(axis), place[axis]) for axis, dim in enumerate(dims)]
