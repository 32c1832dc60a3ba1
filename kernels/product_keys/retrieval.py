"""The best of n * n experts from the best of two times n keys.

N tokens, H queries of a token, S = 2 H halves of queries, n keys of a half, D query size.
"""

import functools

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype

INDEX = torch.int64


@functools.lru_cache(maxsize=64)
def pairs(top_k: int, keys: int) -> tuple[list[int], list[int]]:
    """Places (i, j), in the two halves' sorted lists, that can be among the k largest sums.

    (i, j) has (i + 1)(j + 1) - 1 sums before it that are at least as large, so the product is at most k: of
    k = 8, 20 pairs instead of 64.
    """
    size = min(top_k, keys)
    kept = [(i, j) for i in range(size) for j in range(size) if (i + 1) * (j + 1) <= top_k]
    return [i for i, _ in kept], [j for _, j in kept]


def halves(queries: Tensor) -> Tensor:
    """(N, H, D) -> (S, N, D/2): the two halves of each query, as a view."""
    return queries.unflatten(2, (2, -1)).flatten(1, 2).transpose(0, 1)


def topk(queries: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """scores (N, H, k), largest first, and experts int64 (N, H, k)."""
    dtype = statistics_dtype(queries, keys)
    size_n = keys.shape[2]
    scores_SNn = torch.bmm(halves(queries).to(dtype), keys.flatten(0, 1).to(dtype).transpose(1, 2))
    best, places = (y.unflatten(0, (-1, 2)) for y in scores_SNn.topk(min(top_k, size_n), dim=-1))
    first, second = (torch.tensor(y, device=keys.device) for y in pairs(top_k, size_n))
    sums = best[:, 0].index_select(-1, first).add_(best[:, 1].index_select(-1, second))  # (H, N, pairs)
    scores, chosen = sums.topk(top_k, dim=-1)
    rows = places[:, 0].gather(-1, first[chosen])
    columns = places[:, 1].gather(-1, second[chosen])
    experts = rows.mul_(size_n).add_(columns)
    return scores.transpose(0, 1).contiguous(), experts.transpose(0, 1).contiguous()


def topk_backward(dscores: Tensor, experts: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries (N, H, D) and keys (H, 2, n, D/2)."""
    dtype = statistics_dtype(queries, keys)
    size_n = keys.shape[2]
    places = torch.stack([experts.div(size_n, rounding_mode="floor"), experts.remainder(size_n)], 2)
    places = places.flatten(1, 2).transpose(0, 1)  # (S, N, k)
    dplaces = dscores.to(dtype).transpose(0, 1).repeat_interleave(2, 0)  # (S, N, k)
    dhalf = torch.zeros(*places.shape[:2], size_n, dtype=dtype, device=keys.device)
    if dhalf.device.type == "cpu":
        dhalf.scatter_add_(-1, places, dplaces)
    else:
        scatter_add_in_turn(dhalf, places, dplaces)
    dqueries = torch.bmm(dhalf, keys.flatten(0, 1).to(dtype))  # (S, N, D/2)
    dkeys = torch.bmm(dhalf.transpose(1, 2), halves(queries).to(dtype))  # (S, n, D/2)
    dqueries = dqueries.transpose(0, 1).reshape(queries.shape)
    return dqueries.to(queries.dtype), dkeys.view(keys.shape).to(keys.dtype)


def scatter_add_in_turn(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """x.scatter_add_(-1, places, values) in the order of the values, whatever the device.

    A key stands in several of a query's experts; one of these at a time, nothing is added in a race.
    """
    for k in range(places.shape[-1]):
        at = places[..., k : k + 1]
        x.scatter_(-1, at, x.gather(-1, at).add_(values[..., k : k + 1]))
    return x
