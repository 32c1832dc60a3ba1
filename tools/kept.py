"""The memory that a forward pass leaves behind for backward, storage by storage.

What autograd saves, it keeps alive: tensors in nodes of the graph, and what hooks on saved tensors, custom
operators and checkpoints hold in their place. So the count is taken from lifetimes. A dispatch mode sees
every storage that the forward pass makes; afterwards only the graph is kept, and the storages that still live
are what the graph holds, each counted once whatever views of it were saved. It works on the meta device,
where nothing is allocated. Storages of parameters and buffers are older than the pass, so they do not count;
what was computed from parameters alone (a cast of a weight, a gathered weight) is told apart from
activations.

`hook_bytes` counts the same by torch's saved-tensor hooks, which see no tensor that another hook took; where
no other hook is set, both must agree.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Kept:
    """One storage that backward needs."""

    num_bytes: int
    shape: tuple[int, ...]
    """Of the tensor that made the storage; views may have other shapes."""
    dtype: str
    op: str
    """The operator that made it."""
    module: str
    """Name of the innermost module that was running; empty outside of all."""
    of_weights: bool
    """Computed from parameters alone: a cast or a gathered weight, not an activation."""


@dataclass
class _Made:
    reference: StorageWeakRef
    kept: Kept


@dataclass
class _Recorder(TorchDispatchMode):
    """Notes every storage made, by which operator and in which module."""

    weights: set[int]
    """Keys of storages of parameters, and of what was computed from nothing else."""
    modules: list[str] = field(default_factory=list)
    made: dict[int, _Made] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        of_weights = bool(read) and all(key in self.weights for key in read)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, str(func), of_weights)
        return result

    def _note(self, tensor: Tensor, op: str, of_weights: bool) -> None:
        local = _local(tensor)
        storage = local.untyped_storage()
        key = _key(local)
        known = self.made.get(key)
        if key in self.weights and (known is None or not known.reference.expired()):
            return
        if known is not None and not known.reference.expired():
            return
        module = self.modules[-1] if self.modules else ""
        dtype = str(local.dtype).removeprefix("torch.")
        kept = Kept(
            storage.nbytes(), tuple(local.shape), dtype, op.removesuffix(".default"), module, of_weights
        )
        self.made[key] = _Made(StorageWeakRef(storage), kept)
        # A new storage may have the address of one that died.
        (self.weights.add if of_weights else self.weights.discard)(key)


def kept_by_backward(model: nn.Module, forward: Callable[[], Tensor | tuple[Tensor, ...]]) -> list[Kept]:
    """Storages that stay alive for backward after `forward()`, which must make its own inputs.

    forward's result itself counts only if the graph holds it; an input that requires a gradient is held until
    its gradient is there. Gradients must be enabled.
    """
    weights = {_key(_local(tensor)) for tensor in (*model.parameters(), *model.buffers())}
    recorder = _Recorder(weights)
    handles = _track_modules(model, recorder.modules)
    try:
        with recorder:
            roots = _roots(forward())
    finally:
        for handle in handles:
            handle.remove()
    assert roots, "the result of forward must depend on a parameter or on an input with gradient"
    gc.collect()
    alive = [made.kept for made in recorder.made.values() if not made.reference.expired()]
    # The graph must outlive the count.
    del roots
    return alive


def _roots(result: Tensor | tuple[Tensor, ...]) -> list[Any]:
    """The ends of the graph; a stage may give several tensors."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]


def total_bytes(kept: Iterable[Kept], *, weights: bool = False) -> int:
    """Sum over activations, or over what was computed from weights alone."""
    return sum(one.num_bytes for one in kept if one.of_weights is weights)


def hook_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd hands to saved-tensor hooks, those of parameters left
    out."""
    weights = {_key(_local(tensor)) for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = _key(_local(tensor))
        if key not in weights:
            # Holding the tensor keeps its storage's address from being used again. Autograd may not be handed
            # back a tensor whose graph holds it, so what is held is detached.
            storages[key] = (tensor.detach(), _local(tensor).untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.grad_fn is not None, "the result of forward must depend on a parameter"
    return sum(num_bytes for _, num_bytes in storages.values())


def _track_modules(model: nn.Module, stack: list[str]) -> list[Any]:
    """Keep the name of the innermost running module at the end of `stack`."""
    handles = []
    for name, module in model.named_modules():

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            stack.append(name)

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))
    return handles


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _key(tensor: Tensor) -> int:
    return _local(tensor).untyped_storage()._cdata


def numel(shape: Iterable[int]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)
