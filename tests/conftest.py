"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from triptych.parallel.local import run_local


@pytest.fixture
def distributed() -> Callable[..., list[Any]]:
    """`distributed(world_size, fn, *args, timeout=...)`: results of a module-level `fn` over gloo."""
    return run_local
