"""Rank-one experts without a copy of any expert's vector.

N tokens, J experts of a token, E experts, C channels.

Everything here is one of two products with the sparse (N, E) matrix of a token's experts. Times a table it is
a weighted sum of table rows, and its transpose times tokens a weighted sum of token rows, once the places are
sorted by expert: PyTorch's embedding bags. Its entries are dot products of a token and a table row: what the
gradient of an embedding bag's weights is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype

aten = torch.ops.aten
SUM, NO_PADDING = 0, -1


def weighted_sum(table: Tensor, places: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """(bags, C): for each bag the sum of weights * table[places].

    table: (E, C). places: int64 (P,). starts: int64 (bags + 1,), where in places each bag begins, and their
    end. weights: (P,), made of the table's dtype; the sum is in fp32 at least.
    """
    bags = starts.shape[0] - 1
    if places.numel() == 0 or bags == 0:
        return table.new_zeros(bags, table.shape[1])
    weights = weights.to(table.dtype).contiguous()
    return aten._embedding_bag_forward_only(
        table.contiguous(), places, starts, False, SUM, False, weights, True, NO_PADDING
    )[0]


def dots(x: Tensor, table: Tensor, experts: Tensor) -> Tensor:
    """<x[n], table[experts[n, j]]>: x (N, C), table (E, C), experts (N, J) -> (N, J) of their dtype."""
    if experts.numel() == 0:
        return x.new_zeros(experts.shape)
    found = aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(),
        table.contiguous(),
        experts.flatten(),
        _starts(experts),
        _tokens(experts),
        SUM,
        NO_PADDING,
    )
    return found.view(experts.shape)


def _starts(experts: Tensor) -> Tensor:
    """int64 (N + 1,): where each token's experts begin among all of them."""
    return torch.arange(experts.shape[0] + 1, device=experts.device).mul_(experts.shape[1])


def _tokens(experts: Tensor) -> Tensor:
    """int64 (N * J,): the token of each place."""
    return torch.arange(experts.numel(), device=experts.device).div_(experts.shape[1], rounding_mode="floor")


def activate(x: Tensor, activation: str) -> Tensor:
    """gelu (tanh approximation), silu or relu."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    return F.silu(x) if activation == "silu" else F.relu(x)


def activate_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of `activate`."""
    if activation == "gelu":
        return aten.gelu_backward(dy, x, approximate="tanh")
    return aten.silu_backward(dy, x) if activation == "silu" else aten.threshold_backward(dy, x, 0)


def forward(
    x: Tensor, down: Tensor, up: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """y (N, channels of up) of x's dtype, and what goes into the activation, (N, J) in fp32 or fp64."""
    table = torch.promote_types(x.dtype, down.dtype)
    dtype = statistics_dtype(x, down, weights)
    inner = dots(x.to(table), down.to(table), experts).to(dtype)
    factors = activate(inner, activation).mul_(weights)
    y = weighted_sum(up.to(table), experts.flatten(), _starts(experts), factors.flatten())
    return y.to(x.dtype), inner


def backward(
    dy: Tensor,
    inner: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, ddown, dup, dweights."""
    table = torch.promote_types(x.dtype, down.dtype)
    wide_dy, wide_x = dy.to(table), x.to(table)
    dfactors = dots(wide_dy, up.to(table), experts).to(inner.dtype)
    acted = activate(inner, activation)
    dweights = acted * dfactors
    dinner = activate_backward(dfactors.mul_(weights), inner, activation)
    factors = acted.mul_(weights)
    dx = weighted_sum(down.to(table), experts.flatten(), _starts(experts), dinner.flatten())

    # Sorted by expert, an expert's tokens in their order.
    flat = experts.flatten()
    ordered, order = (flat.to(torch.int16) if down.shape[0] < 2**15 else flat).sort(stable=True)
    every = torch.arange(down.shape[0] + 1, device=flat.device)
    starts = torch.searchsorted(ordered, every.to(ordered.dtype))
    tokens = _tokens(experts)[order]
    ddown = weighted_sum(wide_x, tokens, starts, dinner.flatten()[order])
    dup = weighted_sum(wide_dy, tokens, starts, factors.flatten()[order])
    return dx.to(x.dtype), ddown.to(down.dtype), dup.to(up.dtype), dweights.to(weights.dtype)
