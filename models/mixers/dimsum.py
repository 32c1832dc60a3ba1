"""DiMSUM's mixer (arXiv 2411.04168): a scan over the tokens beside a scan over their wavelet coefficients.

Shape legend: B batch, T length, C hidden size, H query heads, G key-value heads, D head dim, S = 4^levels
wavelet subbands of h x w coefficients.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from triptych import kernels
from triptych.models.config import ModelConfig
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.dropout import Dropout
from triptych.models.init import ZEROS, Init
from triptych.models.linear import Linear
from triptych.models.mixers.attention import Attention
from triptych.models.mixers.mamba1 import Mamba1
from triptych.models.norms import build_norm
from triptych.models.registry import register_mixer
from triptych.models.sharding import COLUMN, ROW, ROW_BIAS, Cut

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values."""
USER = "mixer dimsum, whose wavelet branch transforms whole images,"


@register_mixer("dimsum", char="D")
class Dimsum(nn.Module):
    """u and v, the two halves of the channels, become u + spatial(u) and v + wavelet(v), where spatial is a
    Mamba-1 mixer over the tokens and wavelet one over the coefficients of a Haar transform; then each half
    attends to the other (Fusion).

    Three tensor-parallel regions one after the other; what stands between them acts on each token alone.
    Differs from the paper's code: the two scans have no modulation and gate besides the block's; coefficients
    are not divided by 2^levels; model.scan orders both the tokens and the coefficients of each subband, and
    with line_ends only the tokens' lines are told apart.
    selective recomputation: that of the three parts.
    """

    tread_refusal = "its wavelet branch needs every token of the grid"
    selective = ()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        half = _half(config)
        self.spatial = Mamba1(half, layer)
        self.wavelet = WaveletScan(half, layer)
        self.fusion = Fusion(config)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises ValueError for what is no image, for an odd grid, and for sizes that cannot be halved."""
        if not isinstance(config, DiffusionConfig) or len(config.grid) != 2:
            size = getattr(config, "input_size", None)
            given = f"model.family={config.family}" if size is None else f"model.input_size={list(size)}"
            raise ValueError(
                f"model.pattern={config.pattern!r} has dimsum, which transforms images, and {given} has "
                "none; use family: diffusion with an input_size of two sides, or leave dimsum out"
            )
        levels = config.dimsum.wavelet_levels
        for axis, side in enumerate(config.grid):
            if side % 2**levels:
                raise ValueError(
                    f"model.dimsum.wavelet_levels={levels} needs a grid that {2**levels} divides, and "
                    f"model.input_size[{axis}]={config.input_size[axis]} with model.patch_size="
                    f"{config.patch_size} makes {side} tokens; change one of them"
                )
        halved = {
            "hidden_size": config.hidden_size,
            "attention.num_heads": config.attention.num_heads,
            "attention.num_kv_heads": config.attention.num_kv_heads,
        }
        for key, size in halved.items():
            if size % 2:
                raise ValueError(
                    f"model.{key}={size} is odd, and dimsum halves it between two branches; use an even one"
                )
        Attention.check(config)
        Mamba1.check(_half(config))

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return self.spatial.flops(length) + self.wavelet.flops(length) + self.fusion.flops(length)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        u, v = x_BTC.chunk(2, dim=-1)
        u = u + self.spatial(u, context)
        v = v + self.wavelet(v, context)
        return self.fusion(torch.cat([u, v], dim=-1), context)


class WaveletScan(Mamba1):
    """Mamba-1 over wavelet coefficients, from the coarsest subband to the finest, and the transform back.

    Transforms are linear, so that partial sums stay partial sums.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        if config.scan is not None:
            scan = config.scan.model_copy(update={"line_ends": False})
            config = config.model_copy(update={"scan": scan})
        super().__init__(config, layer)
        self.levels = config.dimsum.wavelet_levels
        self.channels = config.hidden_size

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence, both transforms as matmuls."""
        return super().flops(length) + 2 * 2 * length * self.channels * 4**self.levels

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). Raises ValueError where rows are packed or tokens routed around it."""
        assert context.scan is not None, "a denoiser's context has a scan"
        shape = context.scan.whole_grid(USER)
        bands_BShwC = kernels.haar(x_BTC.unflatten(1, shape), self.levels)
        bands = context.scan.subbands(self.levels, USER)
        y_BTC = super().forward(bands_BShwC.flatten(1, 3), dataclasses.replace(context, scan=bands))
        y_BShwC = y_BTC.unflatten(1, bands_BShwC.shape[1:4])
        return kernels.inverse_haar(y_BShwC, self.levels).flatten(1, 2)


class Fusion(nn.Module):
    """Each half of the channels attends to the other: with H/2 heads per half,
    o(softmax(q_1 k_2ᵀ / sqrt(D)) v_2, softmax(q_2 k_1ᵀ / sqrt(D)) v_1), all tokens visible.

    selective recomputation keeps the outputs of the q, k and v projections and the inputs of o. It drops, and
    computes again in backward, query-key norms, scores, softmax, dropout and contexts.
    """

    tp_region = True
    selective = ("core",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.form = config.attention.form
        self.spatial = _Half(config, bias_of_sum=True)
        self.wavelet = _Half(config, bias_of_sum=False)

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        halves = (self.spatial, self.wavelet)
        weights = sum(half.num_weights() for half in halves)
        scores = sum(half.q_proj.weight.shape[0] for half in halves) * length
        return 2 * length * (weights + 2 * scores)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, C), the halves side by side -> (B, T, C)."""
        u, v = x_BTC.chunk(2, dim=-1)
        y_u, y_v = self.core(self.spatial.project(u), self.wavelet.project(v), context.sample_keys)
        return self.spatial.o_proj(y_u) + self.wavelet.o_proj(y_v)

    def core(
        self, of_u: Projected, of_v: Projected, sample_keys: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What was projected from each half -> what each half's queries found, two (B, T, H/2 D)."""
        q_u, k_u, v_u = self.spatial.heads(*of_u)
        q_v, k_v, v_v = self.wavelet.heads(*of_v)
        attend = functools.partial(kernels.attention, causal=False, form=self.form)
        y_u = attend(q_u, k_v, v_v, dropout=self.spatial.drop(sample_keys))
        y_v = attend(q_v, k_u, v_u, dropout=self.wavelet.drop(sample_keys))
        return y_u.flatten(-2), y_v.flatten(-2)


class _Half(nn.Module):
    """Projections of one half: q, k, v of C/2 channels for H/2 heads (G/2 of keys and values), and the half
    of the output projection that takes in what its queries found.

    bias_of_sum: holds the output's bias, which there is but once.
    """

    def __init__(self, config: ModelConfig, *, bias_of_sum: bool) -> None:
        super().__init__()
        settings = config.attention
        self.head_dim, self.hidden_size = config.head_dim, config.hidden_size
        channels, kv_heads = config.hidden_size // 2, settings.num_kv_heads // 2
        query_size, kv_size = settings.num_heads // 2 * self.head_dim, kv_heads * self.head_dim
        out_bias = settings.bias and bias_of_sum
        self.q_proj = Linear(channels, query_size, bias=settings.bias)
        self.k_proj = Linear(channels, kv_size, bias=settings.bias)
        self.v_proj = Linear(channels, kv_size, bias=settings.bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=out_bias)
        self.q_norm = build_norm(config, self.head_dim) if settings.qk_norm else None
        self.k_norm = build_norm(config, self.head_dim) if settings.qk_norm else None
        self.dropout = Dropout(settings.dropout, cut="heads")
        self.linear_init = config.linear_init
        groups = Cut("kv_heads", count=kv_heads)
        self.sharding = {"q_proj.weight": COLUMN, "k_proj.weight": groups, "v_proj.weight": groups}
        self.sharding |= {"o_proj.weight": ROW}
        if settings.bias:
            self.sharding |= {"q_proj.bias": COLUMN, "k_proj.bias": groups, "v_proj.bias": groups}
        if out_bias:
            self.sharding |= {"o_proj.bias": ROW_BIAS}

    def init(self) -> dict[str, Init]:
        linears = {name: getattr(self, f"{name}_proj") for name in "qkv"}
        table = {
            f"{name}_proj.weight": self.linear_init(*linear.weight.shape) for name, linear in linears.items()
        }
        # Of the two halves' weights side by side, which make the output projection.
        table["o_proj.weight"] = self.linear_init(
            self.hidden_size, 2 * self.o_proj.weight.shape[1], last=True
        )
        biased = [f"{name}_proj" for name in "qkvo" if getattr(self, f"{name}_proj").bias is not None]
        return table | {f"{name}.bias": ZEROS for name in biased}

    def num_weights(self) -> int:
        """Of the four projections, without biases."""
        linears = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return sum(linear.weight.numel() for linear in linears)

    def project(self, x: torch.Tensor) -> Projected:
        """(B, T, C/2) -> queries (B, T, H/2 D), keys and values (B, T, G/2 D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Projected:
        """What `project` gave, by heads (B, T, .., D), queries and keys normed."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def drop(self, sample_keys: torch.Tensor | None) -> functools.partial[torch.Tensor] | None:
        """The dropout of probabilities, None where there is none."""
        if not self.training or self.dropout.p == 0:
            return None
        return functools.partial(self.dropout, sample_keys=sample_keys)


def _half(config: ModelConfig) -> ModelConfig:
    """The configuration of a mixer of half the channels."""
    return config.model_copy(update={"hidden_size": config.hidden_size // 2})
