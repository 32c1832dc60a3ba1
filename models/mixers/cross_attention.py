"""Cross-attention: tokens read an embedded text.

Shape legend: B batch, T length, L tokens of the text, C hidden size, H query heads, G key-value heads,
D head dim.
"""

from __future__ import annotations

import functools

import torch

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.mixers.attention import Attention
from triptych.models.registry import register_mixer


@register_mixer("cross_attention", char="x")
class CrossAttention(Attention):
    """softmax(q kᵀ / sqrt(D)) v with q of the tokens, and k and v of the text, context.memory (B, L, C), all
    of which every token sees (arXiv 1706.03762, section 3.2.3).

    Parameters, heads, biases, norms, dropout and sharding are those of Attention; it has no positions and no
    window. selective recomputation keeps the outputs of q_proj, k_proj and v_proj and the input of o_proj. It
    drops, and computes again in backward, query-key norm, scores, softmax, dropout and context.
    """

    reads_memory = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config, DiffusionConfig), "check() lets no other configuration pass"
        self.memory_length = config.conditioning.text_length

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError without a text to read, and as Attention does."""
        if not isinstance(config, DiffusionConfig) or config.conditioning.kind != "text":
            kind = getattr(getattr(config, "conditioning", None), "kind", None)
            given = f"model.family={config.family}" if kind is None else f"model.conditioning.kind={kind}"
            raise ValueError(
                f"model.pattern={config.pattern!r} has cross_attention, which reads an embedded text, and "
                f"{given} gives it none; use family: diffusion with conditioning: {{kind: text}}, or leave "
                "cross_attention out"
            )
        Attention.check(config)

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence and a text of conditioning.text_length tokens."""
        per_token = self.q_proj.weight.numel() + self.o_proj.weight.numel()
        per_word = self.k_proj.weight.numel() + self.v_proj.weight.numel()
        scores = self.q_proj.weight.shape[0] * length * self.memory_length
        return 2 * (length * per_token + self.memory_length * per_word + 2 * scores)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). Raises ValueError where a pass has no text, or rows hold several images."""
        memory_BLC = context.memory
        if memory_BLC is None:
            raise ValueError(
                "cross_attention reads an embedded text, and this pass has none; give the model `text`, "
                "(B, L, conditioning.text_size)"
            )
        if context.cu_seqlens is not None:
            raise ValueError(
                "cross_attention reads one text per row, and packed rows hold several images; use rows of "
                "one image, or a pattern without cross_attention"
            )
        y_BTX = self.core(self.q_proj(x_BTC), self.k_proj(memory_BLC), self.v_proj(memory_BLC), context)
        return self.o_proj(y_BTX)

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
        """Outputs of the projections (B, T, H D), (B, L, G D), (B, L, G D) -> (B, T, H D)."""
        q_BTHD, k_BLGD, v_BLGD = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BLGD = self.q_norm(q_BTHD), self.k_norm(k_BLGD)
        drop = None
        if self.training and self.dropout.p > 0:
            drop = functools.partial(self.dropout, sample_keys=context.sample_keys)
        y_BTHD = kernels.attention(q_BTHD, k_BLGD, v_BLGD, causal=False, dropout=drop, form=self.form)
        return y_BTHD.flatten(-2)
