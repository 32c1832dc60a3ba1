"""How a foreign model draws its initial values, learnt while it is built and without drawing them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triptych.models.init import Constant, Init, Normal, Uniform

aten = torch.ops.aten


@dataclass(frozen=True)
class TruncatedNormal:
    """scale * erfinv(u) within [least, most], u uniform between low and high."""

    low: float
    high: float
    scale: float = 1.0
    least: float = -math.inf
    most: float = math.inf

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        drawn = torch.erfinv(Uniform(self.low, self.high).values(key, index)) * self.scale
        return drawn.clamp(self.least, self.most)


@dataclass(frozen=True, eq=False)
class Values:
    """The values of a table, such as one of sines."""

    table: torch.Tensor

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return self.table.to(index.device, torch.float64).flatten()[index]


@dataclass(frozen=True)
class Pieces:
    """`base`, but between start and stop (linear indices) what the parts say, the last that does."""

    base: Init
    parts: tuple[tuple[int, int, Init], ...]

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        found = self.base.values(key, index)
        for start, stop, init in self.parts:
            found = torch.where((index >= start) & (index < stop), init.values(key, index), found)
        return found


def recorded(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Init]]:
    """What `build` builds on the CPU, and each parameter's distribution, from the arguments of its draws.

    What would be drawn into a parameter is 0; buffers have their values. No random generator moves.
    Bounds of torch's own trunc_normal_ are not seen, only its standard deviation. Raises ValueError for a
    parameter whose values come about in a way that is not followed.
    """
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), recorder:
        model = build()
    return model, {name: recorder.init_of(name, parameter) for name, parameter in model.named_parameters()}


Law = Init | str
"""A distribution, or why there is none."""
_UNSET = "nothing sets it"
_UNKNOWN = "it is drawn in a way that is not followed"
_DRAWS = {aten.normal_, aten.uniform_}
_NEW_DRAWS = {aten.randn, aten.rand, aten.randn_like, aten.rand_like}
_OTHER_DRAWS = {
    aten.random_,
    aten.bernoulli_,
    aten.exponential_,
    aten.cauchy_,
    aten.geometric_,
    aten.log_normal_,
}
_OTHER_NEW_DRAWS = {aten.randint, aten.randperm, aten.bernoulli, aten.multinomial, aten.normal}
_SAME = {aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh}
_FILLS = {aten.zero_, aten.fill_}


class _Recorder(TorchDispatchMode):
    """Runs what computes; notes what draws, by storage, and what is then done to it."""

    def __init__(self) -> None:
        super().__init__()
        # No entry: the storage holds its values. Storages are held, lest an address be used again.
        self._laws: dict[int, Law] = {}
        self._held: list[Any] = []

    def init_of(self, name: str, parameter: torch.Tensor) -> Init:
        """Of a parameter, behind the build."""
        law = self._laws.get(_key(parameter))
        if isinstance(law, str):
            raise ValueError(f"the initial value of {name} cannot be made a function of the seed: {law}")
        values = parameter.detach()
        if isinstance(law, Pieces) and law.base is _HELD:
            return replace(law, base=Values(values.clone()))
        if law is not None:
            return law
        first = values.flatten()[0]
        return Constant(float(first)) if bool((values == first).all()) else Values(values.clone())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        name = func._schema.name
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], torch.Tensor):
            return self._in_place(func, packet, args, kwargs)
        result = func(*args, **kwargs)
        laws = [self._laws[_key(each)] for each in _tensors((args, kwargs)) if _key(each) in self._laws]
        for made in _tensors(result):
            if packet is aten.empty:
                self._note(made, _UNSET)
            elif packet in _OTHER_NEW_DRAWS:
                self._note(made, _UNKNOWN)
            elif packet in _NEW_DRAWS:
                self._note(made, Normal(1.0) if "randn" in name else Uniform(0.0, 1.0))
            elif laws and _key(made) not in self._laws:
                self._note(made, _after(packet, args, laws[0]) if len(laws) == 1 else _UNKNOWN)
        return result

    def _in_place(self, func: Any, packet: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """An operation that writes its first argument. What is drawn is left at 0, so that loops that draw
        until values lie within bounds end at once."""
        target = args[0]
        before = self._laws.get(_key(target))
        if packet in _DRAWS:
            aten.zero_.default(target)
            return self._note(target, _drawn(packet, args))
        if packet in _OTHER_DRAWS:
            return self._note(target, _UNKNOWN)
        source = self._laws.get(_key(args[1])) if packet is aten.copy_ else None
        if packet in _FILLS or packet is aten.copy_:
            func(*args, **kwargs)
            if source is not None:
                return self._note(target, source)
            if _whole(target):
                self._laws.pop(_key(target), None)
            elif before is not None and before is not _UNSET:
                self._note(target, Constant(float(target.flatten()[0])) if _one_value(target) else _UNKNOWN)
            return target
        if before is None or before is _UNSET:
            func(*args, **kwargs)
            if any(_key(each) in self._laws for each in _tensors((args[1:], kwargs))):
                self._note(target, _UNKNOWN)
            return target
        return self._note(target, _after(packet, args, before) if _whole(target) else _UNKNOWN)

    def _note(self, tensor: torch.Tensor, law: Law) -> torch.Tensor:
        key = _key(tensor)
        before = self._laws.get(key)
        if not _whole(tensor) and law is not before and not isinstance(law, str):
            # Part of a storage that holds values, or another law.
            start, base = tensor.storage_offset(), _HELD if before in (None, _UNSET) else before
            earlier = base.parts if isinstance(base, Pieces) else ()
            base = base.base if isinstance(base, Pieces) else base
            parts = (*earlier, (int(start), int(start) + tensor.numel(), law))
            law = Pieces(base, parts) if tensor.is_contiguous() and not isinstance(base, str) else _UNKNOWN
        self._laws[key] = law
        self._held.append(tensor.untyped_storage())
        return tensor


_HELD: Init = Constant(math.nan)
"""Stands for the values that the parameter holds."""


def _drawn(packet: Any, args: Any) -> Law:
    """The law of normal_(mean, std) or uniform_(low, high)."""
    given = list(args[1:])
    first, second = given + [0.0, 1.0][len(given) :]
    if packet is aten.uniform_:
        return Uniform(first, second)
    return Normal(second) if first == 0 else _UNKNOWN


def _after(packet: Any, args: Any, before: Law) -> Law:
    """The law behind an operation on values of the law `before`."""
    numbers = [each for each in args[1:] if isinstance(each, (int, float))]
    others = [each for each in args if isinstance(each, torch.Tensor)]
    name = packet.__name__.rstrip("_")
    if isinstance(before, str) or packet in _SAME:
        return before
    if name == "erfinv" and isinstance(before, Uniform):
        return TruncatedNormal(before.low, before.high)
    if name in ("mul", "div") and len(numbers) == len(others) == 1:
        return _scaled(before, numbers[0] if name == "mul" else 1 / numbers[0])
    if name == "neg":
        return _scaled(before, -1.0)
    if name in ("add", "sub") and numbers[:1] == [0]:
        return before
    if name == "clamp" and isinstance(before, TruncatedNormal) and len(numbers) == 2:
        return replace(before, least=max(before.least, numbers[0]), most=min(before.most, numbers[1]))
    return _UNKNOWN


def _scaled(init: Init, factor: float) -> Law:
    if isinstance(init, Normal):
        return Normal(init.std * abs(factor))
    if isinstance(init, Constant) and init is not _HELD:
        return Constant(init.value * factor)
    if isinstance(init, Uniform):
        return Uniform(*sorted((init.low * factor, init.high * factor)))
    if isinstance(init, TruncatedNormal) and factor > 0:
        return replace(init, scale=init.scale * factor, least=init.least * factor, most=init.most * factor)
    if isinstance(init, Pieces):
        base = _scaled(init.base, factor)
        parts = [(start, stop, _scaled(part, factor)) for start, stop, part in init.parts]
        whole = not isinstance(base, str) and not any(isinstance(part, str) for *_, part in parts)
        return Pieces(base, tuple(parts)) if whole else _UNKNOWN  # type: ignore[arg-type]
    return _UNKNOWN


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _one_value(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
