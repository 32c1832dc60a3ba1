"""Which keys a query may see. T queries, S keys, B batch."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    length: int, keys: int, *, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """(T, S) bool, or None where every query sees every key. The last query meets the last key."""
    if not causal or (length == 1 and (window is None or window >= keys)):
        return None
    query = torch.arange(keys - length, keys, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    seen = key <= query
    if window is not None and window < keys:
        seen &= key > query - window
    return seen
