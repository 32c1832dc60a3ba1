"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before anything imports Triton: its kernels then run on the CPU, interpreted, where a test names them.
os.environ.setdefault("TRITON_INTERPRET", "1")

from triptych.models.timm_backbone import import_timm
from triptych.parallel.local import run_local


@pytest.fixture
def distributed() -> Callable[..., list[Any]]:
    """`distributed(world_size, fn, *args, timeout=...)`: results of a module-level `fn` over gloo."""
    return run_local


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm, of the environment or of the folder that the Makefile makes for it; ranks find it too."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(sys.prefix) / "timm")])
    importlib.invalidate_caches()
    try:
        return import_timm()
    except ValueError as missing:
        pytest.skip(str(missing))
