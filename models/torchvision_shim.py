"""Lets torchvision's Python part be imported where its compiled part does not load.

PyPI's torchvision is built against CUDA's torch. Beside a CPU build of torch its `_C.so` finds no libraries,
and `import torchvision` dies on "operator torchvision::nms does not exist", because it registers shapes for
operators that only `_C.so` defines. Whatever imports torchvision dies with it: timm, and transformers and
diffusers too. None of what we use of them calls these operators.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

# Operators that torchvision's Python part describes without asking whether the compiled part is there.
_OPERATORS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# A library that is collected takes its definitions with it.
_library: torch.library.Library | None = None


def prepare_torchvision() -> bool:
    """Make `import torchvision` possible; call it before that import or timm's, transformers', diffusers'.

    Where the compiled part is missing, declares the operators it would define, with no implementation:
    calling one still raises torchvision's own error. Where it loads, or torchvision is not installed, changes
    nothing.
    Returns whether operators were declared, now or before.
    """
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _compiled_part_loads(spec.submodule_search_locations or []):
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        _library.define(f"{name}{_SIGNATURE}")
    return True


def _compiled_part_loads(folders: list[str]) -> bool:
    """Whether a file that torchvision would load does load; it loads it the same way when imported."""
    files = (Path(folder) / f"_C{suffix}" for folder in folders for suffix in EXTENSION_SUFFIXES)
    for file in filter(Path.is_file, files):
        try:
            torch.ops.load_library(file)
        except OSError:
            continue
        return True
    return False
