"""DiT as published (arXiv 2212.09748), in plain PyTorch: what `triptych bench diffusion` measures ours
against.

The block is written as the paper's code writes it: LayerNorm without affine, `x * (1 + scale) + shift`,
`x + gate * f`, around timm's Attention (one fused linear for q, k and v, scaled_dot_product_attention) and
Mlp (tanh GELU). timm's own classes are taken where timm can be imported; it needs torchvision, and where that
is missing the same two are written out here, with timm's names of parameters.

Shape legend: B batch, T tokens, C hidden size, H heads, D head dim, K tokens kept.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.models import DiffusionConfig
from triptych.models.torchvision_shim import prepare_torchvision

EPS = 1e-6
FREQUENCIES = 256


class Attention(nn.Module):
    """timm's Attention without what DiT does not use: dropout, norms, masks."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        qkv = self.qkv(x_BTC).reshape(B, T, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHTD, v_BHTD = qkv.unbind(0)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD)
        return self.proj(y_BHTD.transpose(1, 2).reshape(B, T, C))


class Mlp(nn.Module):
    """timm's Mlp without dropout and norm."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BTC)))


def timm_layers() -> tuple[Any, Any, str]:
    """Attention, Mlp, and where they are from: timm and its version, or this file."""
    prepare_torchvision()
    try:
        layers, version = importlib.import_module("timm.layers"), importlib.import_module("timm").__version__
    except ImportError:
        return Attention, Mlp, "written out (timm cannot be imported here)"
    return layers.Attention, layers.Mlp, version


def modulate(x_BTC: Tensor, shift_BC: Tensor, scale_BC: Tensor) -> Tensor:
    return x_BTC * (1 + scale_BC.unsqueeze(1)) + shift_BC.unsqueeze(1)


class DiTBlock(nn.Module):
    """A block with adaLN-Zero."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        attention, mlp, _ = timm_layers()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
        self.attn = attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
        gelu = functools.partial(nn.GELU, approximate="tanh")
        self.mlp = mlp(in_features=hidden_size, hidden_features=4 * hidden_size, act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c_BC: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_BC).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Norm, modulation and a linear to the patches."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BTC: Tensor, c_BC: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BC).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BTC), shift, scale))


class DiT(nn.Module):
    """Class-conditional DiT of our configuration's sizes, on square inputs."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.patch, self.channels = patch, config.predicted_channels
        self.x_embedder = nn.Conv2d(config.in_channels, size, kernel_size=patch, stride=patch)
        self.t_embedder = nn.Sequential(nn.Linear(FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))
        self.y_embedder = nn.Embedding(config.conditioning.num_classes + 1, size)
        self.register_buffer("pos_embed", position_table(config.grid[0], size))
        heads = config.attention.num_heads
        self.blocks = nn.ModuleList(DiTBlock(size, heads) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(size, patch * patch * self.channels)

    def forward(
        self,
        x: Tensor,
        times: Tensor,
        labels: Tensor,
        kept_BK: Tensor | None = None,
        routed: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """(B, channels, height, width) -> (B, predicted channels, height, width).

        kept: tokens that go through the blocks routed[0] to routed[1] - 1, as TREAD (arXiv 2501.04765).
        """
        x_BTC = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c_BC = self.t_embedder(time_features(times)) + self.y_embedder(labels)
        aside_BTC = x_BTC
        for number, block in enumerate(self.blocks):
            if kept_BK is not None and number == routed[0]:
                index = kept_BK.unsqueeze(-1).expand(-1, -1, x_BTC.shape[-1])
                aside_BTC, x_BTC = x_BTC, torch.gather(x_BTC, 1, index)
            x_BTC = block(x_BTC, c_BC)
            if kept_BK is not None and number == routed[1] - 1:
                x_BTC = torch.scatter(aside_BTC, 1, index, x_BTC)
        patches = self.final_layer(x_BTC, c_BC)
        side, p = math.isqrt(patches.shape[1]), self.patch
        image = patches.reshape(-1, side, side, p, p, self.channels)
        return torch.einsum("nhwpqc->nchpwq", image).reshape(-1, self.channels, side * p, side * p)


def position_table(side: int, size: int) -> Tensor:
    """(1, T, C): sines and cosines of the column in the first half of the channels, of the row in the
    other."""
    omega = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64),) * 2, indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]
    return (
        torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)
    )


def time_features(times: Tensor) -> Tensor:
    """(B,) -> (B, 256)."""
    half = FREQUENCIES // 2
    angles = times[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def as_published(config: DiffusionConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, or their gradients, under the names and in the shapes of `DiT`."""
    patch, hidden = config.patch_size, config.hidden_size
    channels = config.predicted_channels

    def head(value: Tensor) -> Tensor:
        # A patch's values are channel-major here, channel-last there.
        return (
            value.unflatten(0, (channels, patch, patch))
            .permute(1, 2, 0, *range(3, value.ndim + 2))
            .flatten(0, 2)
        )

    pairs = {
        "t_embedder.0": "time_embedding.up",
        "t_embedder.2": "time_embedding.down",
        "final_layer.adaLN_modulation.1": "head.modulation.proj",
    }
    for layer in range(config.num_layers):
        there, here = f"blocks.{layer}", f"blocks.{layer}"
        pairs |= {
            f"{there}.attn.proj": f"{here}.mixer.o_proj",
            f"{there}.mlp.fc1": f"{here}.ffn.up_proj",
            f"{there}.mlp.fc2": f"{here}.ffn.down_proj",
            f"{there}.adaLN_modulation.1": f"{here}.modulation.proj",
        }
    found = {"y_embedder.weight": ours["label_embedding.weight"]}
    for leaf in ("weight", "bias"):
        found |= {f"{there}.{leaf}": ours[f"{here}.{leaf}"] for there, here in pairs.items()}
        found[f"final_layer.linear.{leaf}"] = head(ours[f"head.proj.{leaf}"])
        for layer in range(config.num_layers):
            qkv = [ours[f"blocks.{layer}.mixer.{name}_proj.{leaf}"] for name in "qkv"]
            found[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat(qkv)
    found["x_embedder.bias"] = ours["patch_embedding.proj.bias"]
    weight = ours["patch_embedding.proj.weight"]
    found["x_embedder.weight"] = weight.view(hidden, config.in_channels, patch, patch)
    return found
