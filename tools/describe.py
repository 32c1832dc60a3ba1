"""What a configuration means, before anything is allocated: `triptych describe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from triptych.training.sections import RunSections


@dataclass(frozen=True)
class Description:
    """The numbers of one run; `.table()` for people, `.to_json()` for programs."""

    sections: dict[str, Any]

    def table(self) -> RenderableType:
        """Everything as one rich renderable."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The same numbers as plain JSON values."""
        return self.sections


def describe(run: RunSections) -> Description:
    """Model, FLOPs, activation bytes, batch arithmetic and layout of `run`, with no weights allocated.

    Raises ValueError (key, value, mend) where the layout is illegal for the model or the batch.
    """
    raise NotImplementedError
