"""Does every layout give the same training? `triptych verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from triptych.training.session import RunSections


@dataclass(frozen=True)
class VerifyReport:
    """One row per layout."""

    rows: list[Any]

    @property
    def ok(self) -> bool:
        """True when every layout that was run stayed within the tolerance."""
        raise NotImplementedError

    def table(self) -> RenderableType:
        """Largest differences per layout as a rich renderable."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        raise NotImplementedError


def verify(
    run: RunSections,
    layouts: Sequence[str] | None = None,
    *,
    steps: int = 3,
    tolerance: float = 1e-9,
    synthetic: bool = False,
    timeout: float = 600.0,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare each layout of `run` with one process, in float64, over local gloo processes on the CPU.

    layouts: such as "tp2", "tp2.pp2" (or "tp2,pp2"), "dp_shard2.dp_replicate2+selective"; None or empty takes
    the ten of DEFAULT_LAYOUTS and drops, with its reason, each that this configuration makes illegal.
    synthetic: random token ids instead of the corpus of `data.sources` (for when there is none).
    progress: called with one line of text per layout begun and ended.

    Raises ValueError for a layout that cannot be read, for a named layout that is illegal here, and for a
    corpus that is missing (mend: --synthetic).
    """
    raise NotImplementedError
