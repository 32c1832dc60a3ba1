"""Forms that other people's packages bring. They run on GPUs, where installed, after our own check of
them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from triptych.kernels.dispatch import Form, always
from triptych.kernels.triton_launch import lazily


def form(
    name: str,
    package: str,
    module: str,
    function: str,
    *,
    supports: Callable[..., str | None] = always,
) -> Form:
    """The form `name`: our adapter `function` of `module` (imported when first called) to `package`.

    package: what has to be importable, a dotted name where a part of a package is meant.
    """

    def why_not(device: torch.device) -> str | None:
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"package {package} is not installed"
        return None if device.type == "cuda" else f"package {package} needs a GPU"

    return Form(name, lazily(module, function), supports=supports, installed=why_not, trusted=False)
