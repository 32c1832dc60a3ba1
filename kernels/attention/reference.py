"""Attention with materialised scores, autograd by PyTorch.

B batch, T queries, S keys, H heads, G key/value heads, R = H/G, D head dim.

What autograd keeps is q (scaled), k, v and the probabilities (and what the dropout keeps and returns), each
once and in the matmul dtype; the mask is added, since an addition keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triptych.kernels.attention.masks import visible
from triptych.kernels.library import without_autocast
from triptych.kernels.segments import segment_ids


def _bias(
    length: int, keys: int, causal: bool, window: int | None, cu_seqlens: Tensor | None, like: Tensor
) -> Tensor | None:
    """0 where a query sees a key and -inf elsewhere, (T, S) or, packed, (B, 1, 1, T, T)."""
    seen = visible(length, keys, causal=causal, window=window, device=like.device)
    if cu_seqlens is not None:
        ids = segment_ids(cu_seqlens, like.shape[0], length)
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)).view(-1, 1, 1, length, length)
        seen = same if seen is None else same & seen
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Shapes as in the public function."""
    (batch, length, heads, dim), (_, keys, groups, _) = q.shape, k.shape
    repeats = heads // groups
    # Scaling q rather than the scores keeps no scores-sized tensor.
    q = (q * scale).unflatten(2, (groups, repeats)).permute(0, 2, 3, 1, 4).reshape(-1, repeats * length, dim)
    k = k.permute(0, 2, 3, 1).reshape(-1, dim, keys)
    v = v.transpose(1, 2).reshape(-1, keys, v.shape[-1])
    scores = torch.bmm(q, k).view(batch, groups, repeats, length, keys)
    bias = _bias(length, keys, causal, window, cu_seqlens, scores)
    if bias is not None:
        scores = scores + bias
    probabilities = torch.softmax(scores, dim=-1)
    if dropout is not None:
        probabilities = dropout(probabilities.flatten(1, 2)).unflatten(1, (groups, repeats))
    out = torch.bmm(probabilities.view(-1, repeats * length, keys), v)
    return out.view(batch, heads, length, -1).transpose(1, 2)
