"""Initial values as a function of (seed, parameter name, element), so that no layout can change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from triptych.kernels import hash_normal, hash_uniform, string_key

ELEMENTS_AT_ONCE = 1 << 21
"""Elements drawn together; bounds the memory of the float64 and int64 intermediates to some 100 MB."""

LocalWindow = Callable[[str, torch.Tensor], tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]]
"""(name, parameter) -> (the local tensor to fill, its offset in the whole tensor, the whole shape)."""


class Init(Protocol):
    """A distribution: values for elements, given the parameter's key and the elements' linear indices."""

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        """index: int64, any shape. Returns float64 of that shape."""
        ...


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return torch.full(index.shape, self.value, dtype=torch.float64, device=index.device)


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0."""

    std: float

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return hash_normal(key, index) * self.std


@dataclass(frozen=True)
class Uniform:
    """Uniform between low and high."""

    low: float
    high: float

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return self.low + (self.high - self.low) * hash_uniform(key, index)


@dataclass(frozen=True)
class Xavier:
    """Uniform with the variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010)."""

    fan_out: int
    fan_in: int

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        bound = math.sqrt(6 / (self.fan_in + self.fan_out))
        return Uniform(-bound, bound).values(key, index)


@dataclass(frozen=True)
class LogOfUniform:
    """Logarithm of a uniform between low and high: A_log of Mamba-2."""

    low: float
    high: float

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        return Uniform(self.low, self.high).values(key, index).log()


@dataclass(frozen=True)
class InverseSoftplusOfLogUniform:
    """The value whose softplus is log-uniform between low and high: dt_bias of Mamba-2."""

    low: float
    high: float

    def values(self, key: int, index: torch.Tensor) -> torch.Tensor:
        step = Uniform(math.log(self.low), math.log(self.high)).values(key, index).exp()
        return step + torch.log(-torch.expm1(-step))


ZEROS = Constant(0.0)
ONES = Constant(1.0)


def init_table(model: nn.Module) -> dict[str, Init]:
    """Every parameter's name -> its distribution, from the modules' `init()` tables."""
    table: dict[str, Init] = {}
    for module_name, module in model.named_modules():
        for name, init in module.init().items() if hasattr(module, "init") else ():
            table[f"{module_name}.{name}" if module_name else name] = init
    missing = [name for name, _ in model.named_parameters() if name not in table]
    assert not missing, f"no module's init() names the parameters {missing}"
    return table


def whole(name: str, parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """The LocalWindow of one device: the whole tensor."""
    return parameter, (0,) * parameter.ndim, tuple(parameter.shape)


@torch.no_grad()
def initialize(model: nn.Module, seed: int, *, local_window: LocalWindow = whole) -> None:
    """Fills every parameter of the model, in place.

    local_window says for a sharded parameter which part of the whole tensor this process holds.
    """
    table = init_table(model)
    for name, parameter in model.named_parameters():
        local, offset, global_shape = local_window(name, parameter)
        fill(local, table[name], seed, name, offset, global_shape)


@torch.no_grad()
def fill(
    local: torch.Tensor,
    init: Init,
    seed: int,
    name: str,
    offset: tuple[int, ...],
    global_shape: tuple[int, ...],
) -> None:
    """Fills `local`, the window of the whole parameter `name` that begins at `offset`, in place.

    Values are drawn in float64 and then rounded to local's dtype, so that a shard equals the slice of the
    whole bit by bit, in every dtype. A meta tensor is left alone.
    """
    if local.is_meta or local.numel() == 0:
        return
    fits = all(o + n <= g for o, n, g in zip(offset, local.shape, global_shape))
    assert fits, f"{name}: window {tuple(local.shape)} at {offset} leaves the whole {global_shape}"
    key = string_key(seed, name)
    if local.ndim == 0:
        local.copy_(init.values(key, torch.zeros((), dtype=torch.int64, device=local.device)))
        return
    rows = max(1, ELEMENTS_AT_ONCE // max(1, local[0].numel()))
    for start in range(0, local.shape[0], rows):
        part = local[start : start + rows]
        index = _linear_index(part, (offset[0] + start, *offset[1:]), global_shape)
        part.copy_(init.values(key, index))


def _linear_index(part: torch.Tensor, offset: tuple[int, ...], global_shape: tuple[int, ...]) -> torch.Tensor:
    """int64 (*part.shape): each element's index in the whole tensor, laid out row by row."""
    index = torch.zeros((), dtype=torch.int64, device=part.device)
    for o, n, g in zip(offset, part.shape, global_shape):
        index = index.unsqueeze(-1) * g + torch.arange(o, o + n, dtype=torch.int64, device=part.device)
    return index
