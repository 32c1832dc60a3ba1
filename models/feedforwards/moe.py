"""Mixture of experts in place of a feed-forward (arXiv 1701.06538; for vision V-MoE, arXiv 2106.05974).

Shape legend: B batch, T length, N = B T tokens, C hidden size, E experts, K experts of a token, A rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from triptych import kernels
from triptych.models.balancing import attach
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.experts import Experts, LowRankExperts
from triptych.models.feedforwards.gelu import GELU
from triptych.models.feedforwards.swiglu import SwiGLU, default_intermediate_size
from triptych.models.init import ZEROS, Init
from triptych.models.linear import Linear
from triptych.models.norms import wide
from triptych.models.registry import register_ffn
from triptych.models.router_check import check_router
from triptych.models.routers import Router, Routing
from triptych.models.sections import FFNConfig
from triptych.models.sharding import Cut, Shards

DENSE = {"swiglu": SwiGLU, "gelu": GELU}
MATRICES = {"swiglu": 3, "gelu": 2}
"""Of an expert of each kind."""


@register_ffn("moe")
class MoE(nn.Module):
    """sum over a token's experts of weight * expert(x), and what all tokens meet besides.

    Experts are numbered: full ones, low-rank ones, identities. shared: a dense feed-forward that is added.
    With model.moe.residual, of c = softmax(coefficient(x)): c_0 * experts' sum + c_1 * dense (DeepSpeed-MoE).

    Rows keep what goes into the activation, which is computed again in backward; selective recomputation
    drops nothing here, so that rows are sent to their experts once.
    """

    tp_region = True
    sums_inside = True
    selective = ()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings, expert = config.moe, config.moe.expert
        C, size = config.hidden_size, expert_size(config)
        self.linear_init = config.linear_init
        self.num_full = settings.num_experts_of.get(layer, settings.num_experts)
        self.num_low_rank, self.num_identity = settings.low_rank, settings.identity
        costs = settings.costs or (MATRICES[expert.kind] * C * size, 2 * C * settings.rank, C)
        numbers = (self.num_full, self.num_low_rank, self.num_identity)
        per_expert = tuple(float(cost) for cost, number in zip(costs, numbers) for _ in range(number))
        by_expert = settings.router == "expert_choice"
        self.experts_per_token = settings.top_k * (settings.capacity_factor if by_expert else 1.0)
        self.router = Router(config, settings, layer, sum(numbers), "moe", per_expert)
        self.experts = Experts(config, self.num_full, expert.kind, size, expert.bias)
        self.low_rank = (
            LowRankExperts(config, settings.low_rank, settings.rank) if settings.low_rank else None
        )
        dense = settings.shared_experts + settings.residual
        self.shared: SwiGLU | GELU | None = _dense(config, layer, dense * size) if dense else None
        self.coefficient = Linear(C, 2) if settings.residual else None
        self.shards = Shards()
        self.sharding: dict[str, Cut] = {}

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for settings that do not go together."""
        settings = config.moe
        more = settings.low_rank + settings.identity
        layers = [layer for layer, spec in enumerate(config.layer_specs()) if spec.ffn == "moe"]
        counts = {layer: settings.num_experts_of.get(layer, settings.num_experts) + more for layer in layers}
        check_router(config, settings, "model.moe", counts)
        if config.ffn.kind == "moe" and getattr(config, "shared_block_every", False):
            raise ValueError(
                "model.ffn.kind=moe with model.shared_block_every: a token would meet one router several "
                "times, which is not built; write attention+moe in model.pattern, and another model.ffn.kind"
            )

    def init(self) -> dict[str, Init]:
        if self.coefficient is None:
            return {}
        weight = self.linear_init(*self.coefficient.weight.shape)
        return {"coefficient.weight": weight, "coefficient.bias": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence; of unlike experts as if a token met the full ones."""
        met = self.experts_per_token * sum(_matrix_sizes(self.experts))
        dense = 0 if self.shared is None else self.shared.flops(length)
        mix = 0 if self.coefficient is None else self.coefficient.weight.numel()
        return self.router.flops(length) + dense + 2 * length * (round(met) + mix)

    def active_parameters(self) -> int:
        """Parameters that a token meets; of unlike experts as if it met the full ones."""
        one = sum(parameter[0].numel() for parameter in self.experts.parameters())
        met = min(self.experts_per_token, self.num_full) * one
        rest = (self.shared, self.coefficient)
        dense = sum(p.numel() for part in rest if part is not None for p in part.parameters())
        return self.router.active_parameters() + round(met) + dense

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); padding gets zeros from the experts."""
        routing = self.router(x_BTC, context)
        y_BTC = self.mixed(x_BTC.flatten(0, 1), routing).view_as(x_BTC)
        if self.shared is not None:
            dense_BTC = self.shared(x_BTC, context)
            if self.coefficient is not None:
                c_BT2 = wide(self.coefficient(x_BTC)).softmax(-1).to(y_BTC.dtype)
                y_BTC, dense_BTC = y_BTC * c_BT2[..., :1], dense_BTC * c_BT2[..., 1:]
            y_BTC = y_BTC + dense_BTC
        return attach(y_BTC, routing.surrogate)

    def mixed(self, x_NC: torch.Tensor, routing: Routing) -> torch.Tensor:
        """(N, C): the weighted sum of each token's experts."""
        y_NC, first = self._sum_of(self.experts, x_NC, routing, 0, self.num_full), self.num_full
        if self.low_rank is not None:
            y_NC = y_NC + self._sum_of(self.low_rank, x_NC, routing, first, self.num_low_rank)
            first += self.num_low_rank
        # Under tensor parallelism outputs are partial sums, so that one rank adds what is whole.
        if self.num_identity and self.shards.start == 0:
            share_N1 = torch.where(routing.experts >= first, routing.weights, 0).sum(-1, keepdim=True)
            y_NC = y_NC + (share_N1 * x_NC).to(y_NC.dtype)
        return y_NC

    @staticmethod
    def _sum_of(
        experts: nn.Module, x_NC: torch.Tensor, routing: Routing, first: int, number: int
    ) -> torch.Tensor:
        """Of those that are experts first, first + 1, ... of the layer."""
        own_NK = routing.experts - first
        own_NK = torch.where((own_NK >= 0) & (own_NK < number), own_NK, number)
        tokens_A, slots_NK, counts_E = kernels.moe_plan(own_NK, number)
        rows_AC = experts(kernels.moe_gather(x_NC, tokens_A, slots_NK), counts_E)
        return kernels.moe_combine(rows_AC, routing.weights, slots_NK, tokens_A)


def expert_size(config: ModelConfig) -> int:
    """Inner channels of a full expert."""
    rule = default_intermediate_size(config.hidden_size)
    usual = rule if config.moe.expert.kind == "swiglu" else 4 * config.hidden_size
    return config.moe.expert.intermediate_size or usual


def _dense(config: ModelConfig, layer: int, size: int) -> SwiGLU | GELU:
    """A feed-forward of an expert's kind, within the region of the mixture."""
    expert = config.moe.expert
    ffn = FFNConfig(kind=expert.kind, intermediate_size=size, bias=expert.bias)
    kind: Any = DENSE[expert.kind]
    dense = kind(config.model_copy(update={"ffn": ffn}), layer)
    dense.tp_region = False
    return dense


def _matrix_sizes(experts: Experts) -> list[int]:
    """Multiply-adds of a token in each matrix of an expert."""
    return [parameter[0].numel() for parameter in experts.parameters() if parameter.ndim == 3]
