"""Very many experts of rank one, found by product keys (PEER, arXiv 2407.04153; keys of arXiv 1907.05242).

Shape legend: B batch, T length, N = B T tokens, C hidden size, H heads, D key size, n keys of a half, E = n²
experts, J = H top_k experts of a token.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.feedforwards.swiglu import SwiGLU
from triptych.models.init import Init, Uniform
from triptych.models.linear import Linear, unset
from triptych.models.norms import LayerNorm
from triptych.models.registry import register_ffn
from triptych.models.sharding import COLUMN, REPLICATE, Cut


@register_ffn("product_keys")
class ProductKeys(nn.Module):
    """sum over a token's experts of softmax(score)_e gelu(<x, down_e>) up_e, plus shared(x).

    Each head has a query q = norm(query_proj x). Expert i n + j scores <first half of q, keys_0i> + <second
    half, keys_1j>; softmax is over the top_k experts that the head found. The tables down, up (E, C) serve
    all heads.
    Norm: LayerNorm without weights over a query, where the paper has BatchNorm, whose statistics would depend
    on the layout. Under tensor parallelism heads are cut, and the tables are whole.

    selective recomputation drops nothing here: what lies between is a few numbers per expert of a token.
    """

    tp_region = True
    selective = ()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings, C = config.product_keys, config.hidden_size
        H, D, n = settings.num_heads, settings.key_size, math.isqrt(settings.num_experts)
        self.top_k = settings.top_k
        self.linear_init = config.linear_init
        self.query_proj = Linear(C, H * D, bias=False)
        self.query_norm = LayerNorm(D, config.norm_eps, affine=False)
        self.keys = unset(H, 2, n, D // 2)
        self.down = unset(n * n, C)
        self.up = unset(n * n, C)
        self.shared: SwiGLU | None = None
        if settings.shared:
            self.shared = SwiGLU(config, layer)
            self.shared.tp_region = False
        self.sharding: dict[str, Cut] = {
            "query_proj.weight": COLUMN,
            "keys": COLUMN,
            "down": REPLICATE,
            "up": REPLICATE,
        }

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for sizes that do not go together."""
        settings = config.product_keys
        if settings.key_size % 2:
            raise ValueError(
                f"model.product_keys.key_size={settings.key_size} is odd, and half a query meets each key; "
                f"use {settings.key_size + 1}"
            )
        if settings.top_k > settings.num_experts:
            raise ValueError(
                f"model.product_keys.top_k={settings.top_k} exceeds num_experts={settings.num_experts}; "
                f"use at most {settings.num_experts}"
            )

    def init(self) -> dict[str, Init]:
        """The tables as linears between C and the J experts that a token meets; keys so that scores of fresh
        queries have a variance of 1/3 per half (Uniform as in arXiv 1907.05242)."""
        H, _, _, half = self.keys.shape
        J, C = H * self.top_k, self.down.shape[1]
        bound = 1 / math.sqrt(half)
        return {
            "query_proj.weight": self.linear_init(*self.query_proj.weight.shape),
            "keys": Uniform(-bound, bound),
            "down": self.linear_init(J, C),
            "up": self.linear_init(C, J, last=True),
        }

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        dense = 0 if self.shared is None else self.shared.flops(length)
        return dense + 2 * length * (self.query_proj.weight.numel() + self.keys.numel() + self._met())

    def active_parameters(self) -> int:
        """Parameters that a token meets: all keys, and the tables' rows of its experts."""
        dense = 0 if self.shared is None else sum(p.numel() for p in self.shared.parameters())
        return dense + self.query_proj.weight.numel() + self.keys.numel() + self._met()

    def _met(self) -> int:
        """Elements of the tables that a token meets."""
        return 2 * self.keys.shape[0] * self.top_k * self.down.shape[1]

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_NC, H = x_BTC.flatten(0, 1), self.keys.shape[0]
        queries_NHD = self.query_norm(self.query_proj(x_NC).unflatten(-1, (H, -1)))
        scores_NHk, experts_NHk = kernels.product_key_topk(queries_NHD, self.keys, self.top_k)
        weights_NHk = scores_NHk.softmax(-1)
        y_NC = kernels.rank_one_experts(x_NC, self.down, self.up, experts_NHk, weights_NHk)
        y_BTC = y_NC.view_as(x_BTC)
        return y_BTC if self.shared is None else y_BTC + self.shared(x_BTC, context)
