"""Attention whose heads are experts (Mod-Squad, arXiv 2212.08066; Mixture of Attention Heads, arXiv
2210.05144).

Shape legend: B batch, T length, N = B T tokens, C hidden size, E experts, K experts of a token, D head dim,
A rows, S keys (tokens held in the cache and T).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from triptych import kernels
from triptych.models.balancing import attach
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.experts import ExpertLinear
from triptych.models.init import ZEROS, Init
from triptych.models.linear import Linear
from triptych.models.positions import rotate
from triptych.models.registry import register_mixer
from triptych.models.router_check import check_router
from triptych.models.routers import Router
from triptych.models.sharding import REPLICATE, Cut, Shards


@register_mixer("attention_moe", char="e")
class AttentionMoE(nn.Module):
    """sum over a token's experts of weight * o_e(softmax(q_e(x) kᵀ / sqrt(D)) v): each expert is a query
    head, and one key-value head serves all.

    Under tensor parallelism a token's experts are cut over the ranks, and every weight is whole. A head of a
    slot that capacity dropped asks with zeros, and its answer goes nowhere.

    selective recomputation keeps the outputs of the projections and the input of the experts' o, as that of
    attention does.
    """

    tp_region = True
    sums_inside = True
    selective = ("attend",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings, C = config.attention_moe, config.hidden_size
        E, D = settings.num_experts_of.get(layer, settings.num_experts), settings.head_dim
        self.layer = layer
        self.num_slots = settings.top_k
        self.rope_theta = config.attention.rope_theta if config.rope_axes else None
        self.causal = config.causal
        self.linear_init = config.linear_init
        self.router = Router(config, settings, layer, E, "attention_moe")
        self.q_experts = ExpertLinear(config, E, C, D, bias=settings.bias)
        self.k_proj = Linear(C, D, bias=settings.bias)
        self.v_proj = Linear(C, D, bias=settings.bias)
        self.o_experts = ExpertLinear(config, E, D, C, bias=settings.bias, last=True)
        self.shards = Shards()
        self.sharding: dict[str, Cut] = {"k_proj.weight": REPLICATE, "v_proj.weight": REPLICATE}

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for settings that do not go together."""
        settings = config.attention_moe
        layers = [layer for layer, spec in enumerate(config.layer_specs()) if spec.mixer == "attention_moe"]
        counts = {layer: settings.num_experts_of.get(layer, settings.num_experts) for layer in layers}
        check_router(config, settings, "model.attention_moe", counts)
        if settings.router == "expert_choice":
            raise ValueError(
                "model.attention_moe.router=expert_choice gives tokens any number of heads, and attention "
                "needs top_k of each; use softmax, noisy or sigmoid"
            )
        axes = config.rope_axes
        if axes and settings.head_dim % (2 * axes):
            raise ValueError(
                f"model.attention_moe.head_dim={settings.head_dim} must be a multiple of {2 * axes}, pairs "
                f"of channels for rotary positions along {axes} axes; change it, or use no rotary positions"
            )
        if axes > 1 and settings.head_dim != config.head_dim:
            raise ValueError(
                f"model.attention_moe.head_dim={settings.head_dim} differs from model.attention's "
                f"{config.head_dim}, whose rotary frequencies it shares; make them equal"
            )

    def init(self) -> dict[str, Init]:
        table: dict[str, Init] = {}
        for name in ("k_proj", "v_proj"):
            linear = getattr(self, name)
            table[f"{name}.weight"] = self.linear_init(*linear.weight.shape)
            table |= {} if linear.bias is None else {f"{name}.bias": ZEROS}
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence; scores are counted whole, as torch.utils.flop_counter does."""
        one = self.q_experts.weight[0].numel() + self.o_experts.weight[0].numel()
        shared = self.k_proj.weight.numel() + self.v_proj.weight.numel()
        scores = 2 * self.num_slots * self.k_proj.weight.shape[0] * length
        return self.router.flops(length) + 2 * length * (self.num_slots * one + shared + scores)

    def active_parameters(self) -> int:
        """Parameters that a token meets."""
        one = sum(p[0].numel() for part in (self.q_experts, self.o_experts) for p in part.parameters())
        shared = sum(p.numel() for part in (self.k_proj, self.v_proj) for p in part.parameters())
        return self.router.active_parameters() + self.num_slots * one + shared

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x_BTC.shape
        routing = self.router(x_BTC, context)
        experts_NK, weights_NK = (t.chunk(self.shards.count, -1)[self.shards.start] for t in routing[:2])
        E, K = self.router.num_experts, experts_NK.shape[1]
        tokens_A, slots_NK, counts_E = kernels.moe_plan(torch.where(experts_NK >= 0, experts_NK, E), E)
        # A head per slot: to slots and back the rows are those of N K "tokens" with one slot each.
        slots_1, origins_A = slots_NK.reshape(-1, 1), _inverse(slots_NK, tokens_A.shape[0])
        rows_AC = kernels.moe_gather(x_BTC.flatten(0, 1), tokens_A, slots_NK)
        q_AD = self.q_experts(rows_AC, counts_E)
        q_BTKD = kernels.moe_combine(q_AD, torch.ones_like(slots_1, dtype=q_AD.dtype), slots_1, origins_A)
        y_BTKD = self.attend(q_BTKD.view(B, T, K, -1), self.k_proj(x_BTC), self.v_proj(x_BTC), context)
        y_AD = kernels.moe_gather(y_BTKD.reshape(B * T * K, -1), origins_A, slots_1)
        y_NC = kernels.moe_combine(self.o_experts(y_AD, counts_E), weights_NK, slots_NK, tokens_A)
        return attach(y_NC.view_as(x_BTC), routing.surrogate)

    def attend(
        self, q_BTKD: torch.Tensor, k_BTD: torch.Tensor, v_BTD: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """Queries (B, T, K, D), one key and value head (B, T, D) -> (B, T, K, D)."""
        k_BT1D, v_BT1D = k_BTD.unsqueeze(2), v_BTD.unsqueeze(2)
        if self.rope_theta is not None:
            positions = context.positions_of(q_BTKD.shape[1], q_BTKD.device)
            q_BTKD = rotate(q_BTKD, positions, self.rope_theta, context.rope)
            k_BT1D = rotate(k_BT1D, positions, self.rope_theta, context.rope)
        if context.cache is not None:
            held = context.cache.layer(self.layer)
            if held:
                k_BT1D = torch.cat([held["k"], k_BT1D], dim=1)
                v_BT1D = torch.cat([held["v"], v_BT1D], dim=1)
            held["k"], held["v"] = k_BT1D, v_BT1D
        scale = None if context.rope is None else context.rope.temperature / math.sqrt(q_BTKD.shape[-1])
        return kernels.attention(
            q_BTKD, k_BT1D, v_BT1D, causal=self.causal, cu_seqlens=context.cu_seqlens, scale=scale
        )


def _inverse(slots_NK: torch.Tensor, rows: int) -> torch.Tensor:
    """int64 (A,): the slot, numbered through all tokens, of each row."""
    flat = slots_NK.flatten()
    places = torch.where(flat >= 0, flat, rows)
    numbers = torch.arange(flat.numel(), device=flat.device)
    return flat.new_zeros(rows + 1).scatter_(0, places, numbers)[:rows]
