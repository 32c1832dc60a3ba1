"""A problem of `triptych bench kernels`: an operator, shapes for it, its inputs, and what stands beside it.

B batch, T length, H heads, D head dim or channels, G groups, N state, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych import kernels
from triptych.kernels import string_key

Shape = dict[str, int]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Numbers that are a function of a name and a shape, the same in every process."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, name: str, *shape: int, wide: bool = False) -> Tensor:
        """Standard normal. wide: in fp32 whatever the dtype, as decays and biases are held."""
        return self._finished(torch.randn(shape, generator=self._generator(name), device=self.device), wide)

    def uniform(self, name: str, low: float, high: float, *shape: int, wide: bool = False) -> Tensor:
        """Uniform in [low, high)."""
        numbers = torch.rand(shape, generator=self._generator(name), device=self.device)
        return self._finished(low + (high - low) * numbers, wide)

    def integers(self, name: str, below: int, *shape: int) -> Tensor:
        """Uniform in [0, below), int64."""
        return torch.randint(below, shape, generator=self._generator(name), device=self.device)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(string_key(0, name) % 2**31)

    def _finished(self, numbers: Tensor, wide: bool) -> Tensor:
        return numbers if wide and self.dtype != torch.float64 else numbers.to(self.dtype)


@dataclass(frozen=True)
class Peer:
    """Another way to the same result.

    run: takes what the operator takes, gives what it gives. package: what has to be importable, "" for
    nothing. devices: where it runs. without: arguments that it is not given; its result is then held against
    the operator without them.
    """

    name: str
    run: Callable[..., Any]
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    without: tuple[str, ...] = ()

    def missing(self) -> bool:
        """True where its package is not installed."""
        return bool(self.package) and not importable(self.package)


@dataclass(frozen=True)
class Target:
    """What is asked of the ratio to a peer, on one kind of device, of forward and backward.

    speed: least (its time / our time). memory: largest (our peak / its peak). dtype: of the inputs.
    """

    peer: str
    speed: float | None = None
    memory: float | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Problem:
    """What is timed of an operator.

    op: its name, at the dispatcher and in `triptych.kernels`. inputs: the arguments of a call. shapes: by
    "cpu" and "cuda", what is timed there; "check" is small, with sizes of heads as the others have, and
    "tiny" takes milliseconds. repeats: at most so many, for what takes long.
    """

    name: str
    op: str
    inputs: Callable[[Shape, Draw], Arguments]
    shapes: dict[str, list[Shape]]
    peers: tuple[Peer, ...] = ()
    targets: tuple[Target, ...] = ()
    repeats: int = 100
    as_mean: bool = False
    """The gradient of every output is the same, as that of a mean is."""

    def run(self, form: str | None = None) -> Callable[..., Any]:
        """The operator, in a form or as the dispatcher chooses."""
        return lambda **arguments: getattr(kernels, self.op)(**arguments, form=form)


def make_importable() -> None:
    """Let the packages be found that `make install-dev` puts beside the environment, for comparison alone."""
    folder = str(Path(sys.prefix) / "peers")
    if Path(folder).is_dir() and folder not in sys.path:
        sys.path.append(folder)


def importable(package: str) -> bool:
    """Whether a package, or a dotted part of one, can be found."""
    make_importable()
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def eight_documents(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens of eight documents of uneven lengths in each row of T tokens."""
    shares = torch.tensor([0, 1, 3, 4, 7, 9, 12, 14, 16])
    bounds = shares * length // 16
    starts = torch.cat([bounds[:-1] + row * length for row in range(batch)])
    return torch.cat([starts, torch.tensor([batch * length])]).to(device, torch.int32)
