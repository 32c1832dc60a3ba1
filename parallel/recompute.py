"""Activation recomputation: what backward computes again instead of keeping it.

none keeps everything. selective re-runs the methods that a mixer or feed-forward names in `selective`; its
docstring says what that drops (arXiv 2205.05198, section 5). full keeps the inputs of blocks only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from triptych.models import Model
from triptych.models.block import Block
from triptych.parallel.config import Recompute


def apply_recompute(model: Model, policy: Recompute) -> None:
    """Wrap, in place, what the policy recomputes. Comes after tensor parallelism, so that its collectives run
    again with the block, on every rank in the same order."""
    if policy == "full":
        for block in filter(lambda module: isinstance(module, Block), model.modules()):
            _recompute(block, "forward")
    elif policy == "selective":
        for module in model.modules():
            for name in getattr(module, "selective", ()):
                _recompute(module, name)


def _recompute(module: nn.Module, method: str) -> None:
    setattr(module, method, _checkpointed(getattr(module, method)))


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        # Dropout's masks are functions of the samples' keys: there is no generator state to keep.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
