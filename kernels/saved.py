"""What an operator keeps for backward: asked of autograd itself, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Saved:
    """One storage that a call keeps for its backward.

    argument: the name of the argument that it is, which whoever made it may keep anyway; None where the
    operator made it. num_bytes: of the whole storage, whatever part of it is kept.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    argument: str | None


def saved_for_backward(function: Callable[..., Any], /, **arguments: Any) -> list[Saved]:
    """The storages that `function(**arguments)` keeps for backward, each once.

    function: an operator of this room. arguments: as it takes them, by name; tensors on any device, of which
    shapes, strides and dtypes count alone: nothing is computed. Floating ones get gradients.
    Operators with packed documents have to know their bounds: leave `cu_seqlens` out.
    """
    names: dict[int, str] = {}
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.detach().to("meta").requires_grad_(value.is_floating_point())
            names[value.untyped_storage()._cdata] = name
        leaves[name] = value
    found: dict[int, Saved] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held, so that no other storage gets its address; detached, as its graph may hold the hook.
        held.append(tensor.detach())
        key = storage._cdata
        found.setdefault(key, Saved(tuple(tensor.shape), tensor.dtype, storage.nbytes(), names.get(key)))
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**leaves)
    return list(found.values())
