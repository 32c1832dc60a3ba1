"""WKV in both directions out of a form that goes one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def both_ways(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """y and the final state. bidirectional: y is the sum of one sweep from the start, which reads the token
    itself by way of u, and one from the end over the tokens in reverse, which does not."""
    y, state = attend(r, k, v, w, bonus=u, cu_seqlens=cu_seqlens, **options)
    if bidirectional:
        # All rows change places too, so that the documents are in reverse order as a whole.
        tokens = r.shape[0] * r.shape[1]
        cuts = None if cu_seqlens is None else tokens - cu_seqlens.flip(0)
        reverse = [x.flip(0, 1) for x in (r, k, v, w)]
        back, _ = attend(*reverse, bonus=torch.zeros_like(u), cu_seqlens=cuts, **options)
        y = y + back.flip(0, 1)
    return y, state
