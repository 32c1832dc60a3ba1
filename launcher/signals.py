"""Signals as exceptions, so that what was started is stopped on every way out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from triptych.launcher.errors import Terminated


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM, as batch systems send it, unwinds like Ctrl-C: everything that was started is stopped."""

    def raise_terminated(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
