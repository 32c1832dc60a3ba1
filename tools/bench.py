"""Ours beside transformers, in one run: `triptych bench train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class BenchReport:
    """One entry per comparison: times (s), peak memory (bytes), ratios and targets."""

    comparisons: list[Any]

    @property
    def ok(self) -> bool:
        """True when every comparison reaches its target."""
        raise NotImplementedError

    def table(self) -> RenderableType:
        """The comparisons as a rich renderable."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        raise NotImplementedError


def bench_train(
    *,
    repeats: int = 5,
    threads: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """SSD forward+backward and a whole training step, ours against transformers, each side in its own process.

    quick: tiny shapes, one repeat: shows that it works, says nothing about speed.
    Raises RuntimeError when transformers is not installed (mend: pip install 'triptych[hf]') and when the two
    sides do not compute the same numbers.
    """
    raise NotImplementedError
