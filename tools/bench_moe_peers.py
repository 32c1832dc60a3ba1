"""Other ways to compute what our mixture of experts and product keys compute, in plain PyTorch.

Shape legend: N tokens, C hidden size, F inner channels, E experts, K experts of a token; of retrieval H
queries of a token, D query size, n keys of a half, E = n * n.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainMoE(nn.Module):
    """Softmax router and SwiGLU experts, each of which owns its matrices.

    weights: gate_proj, up_proj (E, F, C), down_proj (E, C, F), router (E, C).
    """

    def __init__(self, weights: Mapping[str, Tensor], top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Parameter(weights["router"].clone())
        self.gate_proj = _each(weights["gate_proj"])
        self.up_proj = _each(weights["up_proj"])
        self.down_proj = _each(weights["down_proj"])

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, K), which sum to 1, and experts (N, K)."""
        weights_NK, experts_NK = F.linear(x_NC, self.router).softmax(-1).topk(self.top_k, -1)
        return weights_NK / weights_NK.sum(-1, keepdim=True), experts_NK

    def expert(self, number: int, x_MC: Tensor) -> Tensor:
        """The feed-forward of one expert."""
        inner_MF = F.silu(F.linear(x_MC, self.gate_proj[number])) * F.linear(x_MC, self.up_proj[number])
        return F.linear(inner_MF, self.down_proj[number])

    def gradients(self) -> dict[str, Tensor]:
        """By the names of the weights."""
        found = {"router": _grad(self.router)}
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[name] = torch.stack([_grad(matrix) for matrix in getattr(self, name)])
        return found


class LoopMoE(PlainMoE):
    """For each expert: fetch its tokens, run it, add what it gives, weighted, to where they were."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        weights_NK, experts_NK = self.route(x_NC)
        y_NC = torch.zeros_like(x_NC)
        for number in range(len(self.up_proj)):
            tokens, slots = torch.where(experts_NK == number)
            out_MC = self.expert(number, x_NC.index_select(0, tokens))
            y_NC.index_add_(0, tokens, out_MC * weights_NK[tokens, slots].unsqueeze(1))
        return y_NC


class DenseMoE(PlainMoE):
    """Every expert on every token, weighted with what is mostly zero."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        weights_NK, experts_NK = self.route(x_NC)
        share_NE = weights_NK.new_zeros(x_NC.shape[0], len(self.up_proj)).scatter(1, experts_NK, weights_NK)
        y_NC = torch.zeros_like(x_NC)
        for number in range(len(self.up_proj)):
            y_NC = y_NC + share_NE[:, number : number + 1] * self.expert(number, x_NC)
        return y_NC


def table_of_keys(keys_H2nd: Tensor) -> Tensor:
    """(H, E, D): one key for each expert that scores as its two half keys do."""
    first, second = keys_H2nd.unbind(1)
    n = first.shape[1]
    return torch.cat([first.repeat_interleave(n, 1), second.repeat(1, n, 1)], -1)


def keys_of_table(gradient_HED: Tensor, n: int) -> Tensor:
    """The gradient of the half keys (H, 2, n, D/2) from that of such a table."""
    first, second = gradient_HED.unflatten(1, (n, n)).chunk(2, -1)
    return torch.stack([first.sum(2), second.sum(1)], 1)


def best_of_scores(queries_NHD: Tensor, table_HED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores and experts (N, H, k), from the score of every expert."""
    scores_HNE = torch.bmm(queries_NHD.transpose(0, 1), table_HED.mT)
    scores, experts = scores_HNE.topk(top_k, -1)
    return scores.transpose(0, 1), experts.transpose(0, 1)


def best_of_sums(queries_NHD: Tensor, keys_H2nd: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same from half scores, of which every pair is added up."""
    first, second = (
        torch.bmm(half.transpose(0, 1), keys.mT)
        for half, keys in zip(queries_NHD.chunk(2, -1), keys_H2nd.unbind(1), strict=True)
    )
    scores, experts = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2).topk(top_k, -1)
    return scores.transpose(0, 1), experts.transpose(0, 1)


def _each(weight: Tensor) -> nn.ParameterList:
    """The matrices of a stack as parameters of their own."""
    return nn.ParameterList(matrix.clone() for matrix in weight)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "backward reached every parameter"
    return parameter.grad
