"""Who goes where, from scores alone: by tokens, within capacity, or by experts. Integers; nothing is learned
here.

Shape legend: N tokens, M tokens of the global batch, E experts, K experts of a token, G groups of tokens.
"""

from __future__ import annotations

import torch

NOWHERE = -1
"""In place of an expert."""


def top_experts(choice_NE: torch.Tensor, k: int) -> torch.Tensor:
    """int64 (N, K): the experts of largest choice score, the first of equals first; -1 in place of -inf."""
    values_NE, experts_NE = choice_NE.sort(dim=-1, descending=True, stable=True)
    return torch.where(values_NE[:, :k] > -torch.inf, experts_NE[:, :k], NOWHERE)


def first_come(chosen_MK: torch.Tensor, priority_M: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """bool (M, K): which choices find room if each expert takes `capacity` tokens: first choices before
    second ones, and among them tokens of larger priority first, the earlier of equals (batch prioritised,
    arXiv 2106.05974, algorithm 1)."""
    M, K = chosen_MK.shape
    order_M = coarse(priority_M).sort(descending=True, stable=True).indices
    queue = chosen_MK[order_M].T.flatten()
    experts, members = queue.sort(stable=True)
    places = torch.arange(K * M, device=queue.device) - torch.searchsorted(experts, experts)
    room = torch.empty_like(queue, dtype=torch.bool).scatter_(0, members, places < capacity)
    kept_MK = torch.empty_like(chosen_MK, dtype=torch.bool).index_copy_(0, order_M, room.view(K, M).T)
    return kept_MK & (chosen_MK != NOWHERE)


def coarse(scores: torch.Tensor) -> torch.Tensor:
    """Scores, float32 or float64, rounded to the upper half of their mantissa; infinities stay.

    Equal tokens (the first of two documents that begin alike) have equal scores but for the rounding of
    products, which depends on the layout. Rounded they are equal, and their order in the global batch
    decides.
    """
    integers, dropped = (torch.int64, 26) if scores.dtype == torch.float64 else (torch.int32, 12)
    bits = scores.contiguous().view(integers)
    return (bits + (1 << (dropped - 1)) & -(1 << dropped)).view(scores.dtype)


def best_tokens(choice_GME: torch.Tensor, capacity_G: torch.Tensor) -> torch.Tensor:
    """bool (G, M, E): the tokens that each expert takes of each group, the earlier of equals; never one of
    -inf (arXiv 2202.09368)."""
    order = coarse(choice_GME).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(order.shape[1], device=order.device).view(1, -1, 1).expand_as(order)
    places = torch.empty_like(order).scatter_(1, order, ranks)
    return (places < capacity_G.view(-1, 1, 1)) & (choice_GME > -torch.inf)
