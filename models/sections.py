"""Subsections of `model:` that configure one kind of layer each."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionConfig(Section):
    """Grouped-query attention."""

    num_heads: int = Field(default=8, ge=1)
    """Query heads."""
    num_kv_heads: int = Field(default=0, ge=0)
    """Key and value heads, a divisor of num_heads; unset: as many as num_heads."""
    head_dim: int | None = Field(default=None, ge=1)
    """Channels per head; unset: hidden_size / num_heads."""
    rope_theta: float | None = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding; null: no position embedding."""
    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head, before the rotation."""
    window: int | None = Field(default=None, ge=1)
    """A token sees itself and the window - 1 tokens before it; null: the whole document before it."""
    bias: bool = False
    """Biases in the four projections."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention probabilities set to zero in training; needs materialised scores."""
    form: str | None = None
    """Form of the attention kernel, such as "sdpa" or "reference" (materialised scores); null: automatic."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("num_kv_heads") is None:
            default = cls.model_fields["num_heads"].default
            return {**values, "num_kv_heads": values.get("num_heads", default)}
        return values


class Mamba1Config(Section):
    """Mamba-1 (arXiv 2312.00752)."""

    state_size: int = Field(default=16, ge=1)
    """Size N of the state per channel."""
    expand: float = Field(default=2.0, gt=0)
    """Inner channels = expand * hidden_size."""
    dt_rank: int | None = Field(default=None, ge=1)
    """Rank of the projection of the time step; unset: hidden_size / 16, rounded up."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the causal convolution, in tokens."""
    chunk_size: int = Field(default=32, ge=1)
    """Tokens per chunk of the scan; changes speed and memory, never the result."""
    dt_min: float = Field(default=0.001, gt=0)
    """Smallest time step at initialisation."""
    dt_max: float = Field(default=0.1, gt=0)
    """Largest time step at initialisation."""


class Mamba2Config(Section):
    """Mamba-2 (arXiv 2405.21060)."""

    state_size: int = Field(default=64, ge=1)
    """Size N of the state per channel."""
    head_dim: int = Field(default=64, ge=1)
    """Channels P per head; a divisor of expand * hidden_size."""
    expand: float = Field(default=2.0, gt=0)
    """Inner channels = expand * hidden_size."""
    num_groups: int = Field(default=1, ge=1)
    """Groups of heads with b and c in common, and of channels in the gated norm; a divisor of the heads."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the causal convolution, in tokens."""
    chunk_size: int = Field(default=64, ge=1)
    """Tokens per chunk of the scan; changes speed and memory, never the result."""
    dt_min: float = Field(default=0.001, gt=0)
    """Smallest time step at initialisation."""
    dt_max: float = Field(default=0.1, gt=0)
    """Largest time step at initialisation."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Bounds to which the time step is clamped in every forward pass."""


class FFNConfig(Section):
    """Feed-forward of the pattern items that name none."""

    kind: str = "swiglu"
    """swiglu, gelu, channel_mix (RWKV's), or none: blocks without a feed-forward."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Inner channels; unset: 8/3 * hidden_size up to a multiple of 64 (swiglu), or 4 * hidden_size
    (gelu, channel_mix)."""
    bias: bool = False
    """Biases in the projections."""


class WKVConfig(Section):
    """Bidirectional WKV of Vision-RWKV (arXiv 2403.02308) and Diffusion-RWKV (arXiv 2404.04478)."""

    shift: Literal["quad", "none"] = "quad"
    """quad: a quarter of the channels each comes from the four neighbours on the grid; none: no shift."""


class SS2DConfig(Section):
    """VMamba's two-dimensional selective scan (arXiv 2401.10166)."""

    state_size: int = Field(default=1, ge=1)
    """Size N of the state per channel."""
    expand: float = Field(default=2.0, gt=0)
    """Inner channels = expand * hidden_size."""
    dt_rank: int | None = Field(default=None, ge=1)
    """Rank of the projection of the time step; unset: hidden_size / 16, rounded up."""
    conv_kernel: int = Field(default=3, ge=1)
    """Edge of the depthwise convolution over the grid, in tokens; odd."""
    chunk_size: int = Field(default=32, ge=1)
    """Tokens per chunk of the scan; changes speed and memory, never the result."""
    dt_min: float = Field(default=0.001, gt=0)
    """Smallest time step at initialisation."""
    dt_max: float = Field(default=0.1, gt=0)
    """Largest time step at initialisation."""


class MLSTMConfig(Section):
    """mLSTM of xLSTM (arXiv 2405.04517) in the block of Vision-LSTM (arXiv 2406.04303)."""

    expand: float = Field(default=2.0, gt=0)
    """Inner channels = expand * hidden_size."""
    num_heads: int = Field(default=4, ge=1)
    """Heads, each with a matrix for its memory; a divisor of the inner channels."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the causal convolution, in tokens."""
    qkv_block: int = Field(default=4, ge=1)
    """Queries, keys and values are projected within blocks of so many channels; a divisor of a head's."""
    chunk_size: int = Field(default=64, ge=1)
    """Tokens worked on by one matmul; changes speed and memory, never the result."""


class DimsumConfig(Section):
    """DiMSUM's spatial and wavelet scans (arXiv 2411.04168)."""

    wavelet_levels: int = Field(default=2, ge=1)
    """Levels of the Haar transform; 2 to their power divides the grid's height and width."""


class ScanConfig(Section):
    """The orders in which scan mixers (mamba1, mamba2, mlstm) visit the tokens of an image."""

    orders: tuple[str, ...] = Field(default=("raster",), min_length=1)
    """Names of `models/scan_order.py`, such as raster, column+reverse, zigzag:3, window:4, hilbert."""
    merge: Literal["cycle", "sum"] = "cycle"
    """cycle: layer i scans in orders[i % n]. sum: every layer scans in all of them, with one set of weights,
    and takes the mean of the results."""
    line_ends: bool = False
    """A learned padding token stands at the end of each line of the scan, so that lines are told apart."""

    def orders_of(self, layer: int) -> tuple[str, ...]:
        """The orders in which block `layer` scans."""
        return self.orders if self.merge == "sum" else (self.orders[layer % len(self.orders)],)
