"""What a denoiser is told, and how it acts on the blocks.

Shape legend: B rows, G images per row (1 outside packed rows), T length, C hidden size, L text tokens,
K chunks of a modulation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from triptych import kernels
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import ZEROS, Init, Normal, Xavier
from triptych.models.linear import Linear, unset
from triptych.models.norms import LayerNorm, to_compute

FREQUENCIES = 256
"""Sines and cosines of the time."""
SHARED_CHUNKS = 6
"""Shift, scale and gate of two branches."""


def time_features(times: torch.Tensor) -> torch.Tensor:
    """(...,) -> (..., 256): cosines and sines of the times at frequencies 10000^(-i / 128), in float32 at
    least (arXiv 2006.11239)."""
    half = FREQUENCIES // 2
    times = times if times.dtype == torch.float64 else times.float()
    exponents = torch.arange(half, device=times.device, dtype=times.dtype) / half
    angles = times.unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """down(silu(up(features of the time)))."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.up = Linear(FREQUENCIES, config.hidden_size)
        self.down = Linear(config.hidden_size, config.hidden_size)
        self.std = config.init_std

    def init(self) -> dict[str, Init]:
        weights: dict[str, Init] = dict.fromkeys(("up.weight", "down.weight"), Normal(self.std))
        return {**weights, "up.bias": ZEROS, "down.bias": ZEROS}

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """(B, G), already on the embedding's scale -> (B, G, C)."""
        dtype = self.up.weight.dtype
        return self.down(F.silu(self.up(time_features(times).to(dtype)))).to(dtype)


class LabelEmbedding(nn.Module):
    """Labels -> vectors. weight: (num_classes + 1, C); the last row says "no label"."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.weight = unset(config.conditioning.num_classes + 1, config.hidden_size)
        self.std = config.init_std

    def init(self) -> dict[str, Init]:
        return {"weight": Normal(self.std)}

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """int (B, G) -> (B, G, C)."""
        return F.embedding(labels, self.weight)


class TextProjection(nn.Module):
    """Embedded text -> what cross-attention reads, (B, L, E) -> (B, L, C)."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.proj = Linear(config.conditioning.text_size, config.hidden_size)

    def init(self) -> dict[str, Init]:
        return {"proj.weight": Xavier(*self.proj.weight.shape), "proj.bias": ZEROS}

    def forward(self, text_BLE: torch.Tensor) -> torch.Tensor:
        dtype = self.proj.weight.dtype
        return self.proj(text_BLE.to(dtype)).to(dtype)


class SharedModulation(nn.Module):
    """The part of low-rank modulations that all blocks have in common (FiTv2)."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.proj = Linear(config.hidden_size, SHARED_CHUNKS * config.hidden_size)

    def init(self) -> dict[str, Init]:
        return {"proj.weight": ZEROS, "proj.bias": ZEROS}

    def forward(self, conditioning_BGC: torch.Tensor) -> torch.Tensor:
        """(B, G, C) -> (B, G, 6 C)."""
        return self.proj(conditioning_BGC).to(self.proj.weight.dtype)


class Modulation(nn.Module):
    """Shifts, scales and gates as functions of the conditioning; zero at first (adaLN-Zero, arXiv
    2212.09748).

    Parameters: proj, or down and up where a rank is given. In packed rows every token has those of its image;
    where T is cut over ranks, parallel/tensor.py sets shard_rank and shard_count.
    """

    def __init__(self, hidden_size: int, chunks: int, rank: int | None = None) -> None:
        super().__init__()
        self.chunks = chunks
        self.proj = None if rank else Linear(hidden_size, chunks * hidden_size)
        self.down = Linear(hidden_size, rank) if rank else None
        self.up = Linear(rank, chunks * hidden_size) if rank else None
        self.shard_rank = 0
        self.shard_count = 1

    def init(self) -> dict[str, Init]:
        if self.proj is not None:
            return {"proj.weight": ZEROS, "proj.bias": ZEROS}
        assert self.down is not None, "without proj there are down and up"
        return {
            "down.weight": Xavier(*self.down.weight.shape),
            "down.bias": ZEROS,
            "up.weight": ZEROS,
            "up.bias": ZEROS,
        }

    def flops(self) -> int:
        """Forward FLOPs per image."""
        linears = filter(None, (self.proj, self.down, self.up))
        return 2 * sum(linear.weight.numel() for linear in linears)

    def forward(self, context: Context) -> tuple[torch.Tensor, ...]:
        """`chunks` tensors (B, 1, C), or (B, T, C) in packed rows."""
        c_BGC = context.conditioning
        assert c_BGC is not None, "a denoiser's context has its conditioning"
        if self.proj is not None:
            m_BGK = self.proj(c_BGC)
        else:
            assert self.down is not None and self.up is not None, "without proj there are down and up"
            assert context.shared_modulation is not None, "the model has a SharedModulation"
            m_BGK = self.up(self.down(c_BGC))
            m_BGK = m_BGK + context.shared_modulation[..., : m_BGK.shape[-1]]
        if context.images is not None:
            images_BT = context.images.chunk(self.shard_count, dim=1)[self.shard_rank]
            m_BGK = m_BGK.gather(1, images_BT.unsqueeze(-1).expand(-1, -1, m_BGK.shape[-1]))
        return m_BGK.chunk(self.chunks, dim=-1)


def modulate(x_BTC: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x_BTC, 1 + scale)


def modulated(norm: nn.Module, x_BTC: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """norm(x) (1 + scale) + shift; with a layer norm of no weights as one operator, which keeps x alone."""
    if isinstance(norm, LayerNorm) and norm.weight is None:
        return to_compute(kernels.modulated_layer_norm(x_BTC, shift, scale, norm.eps))
    return modulate(norm(x_BTC), shift, scale)
