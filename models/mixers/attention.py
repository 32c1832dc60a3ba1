"""Grouped-query attention with rotary positions, query-key norm and a sliding window.

Shape legend: B batch, T length, C hidden size, H query heads, G key-value heads, D head dim, S keys (tokens
held in the cache and T).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig, require_divides
from triptych.models.context import Context
from triptych.models.dropout import Dropout
from triptych.models.init import ZEROS, Init
from triptych.models.linear import Linear
from triptych.models.norms import build_norm
from triptych.models.positions import rotate
from triptych.models.registry import register_mixer
from triptych.models.sharding import COLUMN, ROW, ROW_BIAS, Cut


@register_mixer("attention", char="*")
class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v, causal in language models; G key-value heads serve H / G query heads each
    (arXiv 2305.13245).

    selective recomputation keeps the outputs of q_proj, k_proj and v_proj and the input of o_proj. It drops,
    and computes again in backward, query-key norm, rotation, scores, softmax, dropout and context. A fused
    kernel alone, without norm and rotation, keeps nothing else: then nothing is computed again.
    """

    tp_region = True
    selective = ("core",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        settings = config.attention
        self.layer = layer
        self.head_dim = config.head_dim
        self.rope_theta = settings.rope_theta
        self.window = settings.window
        self.form = settings.form
        self.causal = config.causal
        self.rope_axes = config.rope_axes
        query_size, kv_size = settings.num_heads * self.head_dim, settings.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=settings.bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=settings.bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=settings.bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=settings.bias)
        self.q_norm = build_norm(config, self.head_dim) if settings.qk_norm else None
        self.k_norm = build_norm(config, self.head_dim) if settings.qk_norm else None
        self.linear_init = config.linear_init
        self.dropout = Dropout(settings.dropout, cut="heads")
        kv_heads = Cut("kv_heads", count=settings.num_kv_heads)
        self.sharding = {"q_proj.weight": COLUMN, "k_proj.weight": kv_heads, "v_proj.weight": kv_heads}
        self.sharding |= {"o_proj.weight": ROW}
        if settings.bias:
            self.sharding |= {"q_proj.bias": COLUMN, "k_proj.bias": kv_heads, "v_proj.bias": kv_heads}
            self.sharding |= {"o_proj.bias": ROW_BIAS}

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for head counts, sizes and dropout that do not go together."""
        settings = config.attention
        heads = settings.num_heads
        require_divides(
            "model.attention.num_kv_heads", settings.num_kv_heads, "model.attention.num_heads", heads
        )
        if settings.head_dim is None:
            require_divides("model.attention.num_heads", heads, "model.hidden_size", config.hidden_size)
        if config.rope_axes and settings.rope_theta is not None and config.head_dim % 2:
            raise ValueError(
                f"model.attention.head_dim={config.head_dim} is odd, and rotary positions turn pairs of "
                "channels; use an even head_dim, or model.attention.rope_theta=null"
            )
        if settings.dropout and settings.form not in (None, "reference"):
            raise ValueError(
                f"model.attention.dropout={settings.dropout} needs materialised scores, which "
                f"model.attention.form={settings.form!r} never has; use form: reference, or dropout: 0"
            )

    def init(self) -> dict[str, Init]:
        table: dict[str, Init] = {
            f"{name}.weight": self.linear_init(*getattr(self, name).weight.shape, last=name == "o_proj")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        if self.o_proj.bias is not None:
            table |= {f"{name}.bias": ZEROS for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return table

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence; scores are counted whole, as torch.utils.flop_counter does."""
        linears = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        scores = self.q_proj.weight.shape[0] * length
        return 2 * length * (sum(linear.weight.numel() for linear in linears) + 2 * scores)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        attend = self.attend if self._keeps_little(context) else self.core
        return self.o_proj(attend(self.q_proj(x_BTC), self.k_proj(x_BTC), self.v_proj(x_BTC), context))

    def _keeps_little(self, context: Context) -> bool:
        """Whether `attend` keeps nothing for backward but its inputs and output."""
        turned = self.rope_axes and self.rope_theta is not None
        packed = context.cu_seqlens is not None
        fused = self.form != "reference" and self.dropout.p == 0
        return fused and self.q_norm is None and not turned and not packed

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
        """`attend`, as selective recomputation runs it again."""
        return self.attend(q, k, v, context)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
        """Outputs of the projections (B, T, H D), (B, T, G D), (B, T, G D) -> context (B, T, H D)."""
        q_BTHD, k_BTGD, v_BTGD = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        if self.rope_axes and self.rope_theta is not None:
            positions = context.positions_of(q.shape[1], q.device)
            q_BTHD = rotate(q_BTHD, positions, self.rope_theta, context.rope)
            k_BTGD = rotate(k_BTGD, positions, self.rope_theta, context.rope)
        k_BSGD, v_BSGD = self._with_cache(k_BTGD, v_BTGD, context)
        drop = None
        if self.training and self.dropout.p > 0:
            drop = functools.partial(self.dropout, sample_keys=context.sample_keys)
        y_BTHD = kernels.attention(
            q_BTHD,
            k_BSGD,
            v_BSGD,
            causal=self.causal,
            window=self.window,
            cu_seqlens=context.cu_seqlens,
            scale=None if context.rope is None else context.rope.temperature / math.sqrt(self.head_dim),
            dropout=drop,
            form=self.form,
        )
        return y_BTHD.flatten(-2)

    def _with_cache(
        self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens seen before, then the new ones; (B, S, G, D)."""
        if context.cache is None:
            return k_BTGD, v_BTGD
        held = context.cache.layer(self.layer)
        if held:
            k_BTGD = torch.cat([held["k"], k_BTGD], dim=1)
            v_BTGD = torch.cat([held["v"], v_BTGD], dim=1)
        # The next token sees itself and window - 1 before it.
        keep = k_BTGD.shape[1] if self.window is None else min(k_BTGD.shape[1], self.window - 1)
        first = k_BTGD.shape[1] - keep
        held["k"], held["v"] = k_BTGD[:, first:], v_BTGD[:, first:]
        return k_BTGD, v_BTGD
