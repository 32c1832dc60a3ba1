"""Attention with materialised scores, autograd by PyTorch.

B batch, T queries, S keys, H heads, G key/value heads, R = H/G, D head dim.

    s[t, j] = cap * tanh(scale * q[t] . k[j] / cap) + bias[t, j], without a cap scale * q[t] . k[j] + bias
    p[t, j] = exp(s[t, j]) / (exp(sink) + sum over the keys i seen by t of exp(s[t, i]))
    y[t] = sum over the keys j seen by t of p[t, j] v[j],  zeros where t sees none

What autograd keeps is q (scaled), k, v and the probabilities (and what the dropout keeps and returns), each
once and in the matmul dtype; the mask is added, since an addition keeps nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.attention.limits import Dropout
from triptych.kernels.attention.masks import all_visible, row_may_be_empty
from triptych.kernels.library import without_autocast


def _bias(hidden: Tensor | None, groups: int, repeats: int, like: Tensor) -> Tensor | None:
    """A mask that broadcasts to (B, H, T, S) as a bias that does so to (B, G, R, T, S), -inf where hidden."""
    if hidden is None:
        return None
    if hidden.dim() == 4:
        hidden = hidden.unsqueeze(2) if hidden.shape[1] == 1 else hidden.unflatten(1, (groups, repeats))
    if hidden.dtype != torch.bool:
        return hidden
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(~hidden, -torch.inf)


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int | None,
    right: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout,
) -> Tensor:
    """Shapes as in the public function; left and right as in `masks`; mask has four dimensions."""
    (batch, length, heads, dim), (_, keys, groups, _) = q.shape, k.shape
    repeats = heads // groups
    # Scaling q rather than the scores keeps no scores-sized tensor.
    q = (q * scale).unflatten(2, (groups, repeats)).permute(0, 2, 3, 1, 4).reshape(-1, repeats * length, dim)
    k = k.permute(0, 2, 3, 1).reshape(-1, dim, keys)
    v = v.transpose(1, 2).reshape(-1, keys, v.shape[-1])
    scores = torch.bmm(q, k).view(batch, groups, repeats, length, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = all_visible(length, keys, left, right, cu_seqlens, mask, batch, scores.device)
    bias = _bias(hidden, groups, repeats, scores)
    if bias is not None:
        scores = scores + bias
    empty = None
    if row_may_be_empty(length, keys, right, mask):
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
    if sink is None:
        probabilities = torch.softmax(scores, dim=-1)
    else:
        logit = sink.to(scores.dtype).view(groups, repeats, 1, 1).expand(*scores.shape[:-1], 1)
        probabilities = torch.softmax(torch.cat([scores, logit], dim=-1), dim=-1)[..., :-1]
    if empty is not None:
        probabilities = probabilities.masked_fill(empty, 0.0)
    if dropout is not None:
        probabilities = dropout(probabilities.flatten(1, 2)).unflatten(1, (groups, repeats))
    out = torch.bmm(probabilities.reshape(-1, repeats * length, keys), v)
    return out.view(batch, heads, length, -1).transpose(1, 2)
