"""Which keys a query may see. B batch, T queries, S keys, H heads.

Query t stands at key t + S - T, so that the last query meets the last key. It sees `left` keys before that
one, that one, and `right` after it; None on a side: all. Causal is right = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.segments import segment_ids


def sides(window: int | tuple[int, int] | None, causal: bool) -> tuple[int | None, int | None]:
    """(left, right) of the public arguments."""
    if isinstance(window, int):
        window = (window - 1, 0)
    return (None, 0 if causal else None) if window is None else window


def clip(left: int | None, right: int | None, length: int, keys: int) -> tuple[int | None, int | None]:
    """None for a side that hides nothing."""
    return (
        None if left is None or left >= keys - 1 else left,
        None if right is None or right >= length - 1 else right,
    )


def visible(
    length: int, keys: int, left: int | None, right: int | None, device: torch.device
) -> Tensor | None:
    """(T, S) bool, or None where every query sees every key."""
    if left is None and right is None:
        return None
    query = torch.arange(keys - length, keys, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    seen = None if right is None else key <= query + right
    if left is not None:
        near = key >= query - left
        seen = near if seen is None else seen & near
    return seen


def of_one_document(cu_seqlens: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, 1, T, T) bool: query and key belong to one document."""
    ids = segment_ids(cu_seqlens, batch, length).to(device)
    return (ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1)


def all_visible(
    length: int,
    keys: int,
    left: int | None,
    right: int | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    batch: int,
    device: torch.device,
) -> Tensor | None:
    """What hides a key, in one mask that broadcasts to (B, H, T, S): bool, or a bias with -inf where the bias
    `mask` is one; None where all is seen."""
    seen = visible(length, keys, left, right, device)
    if cu_seqlens is not None:
        same = of_one_document(cu_seqlens, batch, length, device)
        seen = same if seen is None else same & seen
    if seen is None or mask is None:
        return mask if seen is None else seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def row_may_be_empty(length: int, keys: int, right: int | None, mask: Tensor | None) -> bool:
    """Whether a query may see no key at all, as far as can be said without looking at the mask."""
    return mask is not None or (right is not None and keys - length + right < 0)
