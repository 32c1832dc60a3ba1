"""Section `model:` of a run's configuration: what is built, never how it is cut or trained."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from triptych.models.registry import CHARACTERS, FEEDFORWARD_CHARACTER, FEEDFORWARDS, MIXERS, NONE


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
    """swiglu, gelu, or none: blocks without a feed-forward."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Inner channels; unset: 8/3 * hidden_size up to a multiple of 64 (swiglu), or 4 * hidden_size (gelu)."""
    bias: bool = False
    """Biases in the projections."""


class LayerSpec(NamedTuple):
    """What stands in one block: names in the registry, or None for nothing."""

    mixer: str | None
    ffn: str | None

    @property
    def kind(self) -> str:
        """The block's kind as a pattern item, such as "mamba2+swiglu"."""
        return f"{self.mixer or NONE}+{self.ffn or NONE}"


class ModelConfig(Section):
    """A backbone: embedding, blocks after a pattern, norm and head."""

    family: Literal["lm"] = "lm"
    """Language model."""
    vocab_size: int = Field(ge=2)
    """Rows of the embedding and of the head."""
    hidden_size: int = Field(ge=1)
    """Channels of the residual stream."""
    num_layers: int = Field(ge=1)
    """Blocks; the pattern is repeated over them and may end in its middle."""
    pattern: str | list[str] = Field(default=["attention"], min_length=1)
    """What stands in the blocks. A list of items "mixer" or "mixer+ffn" (mixers: mamba2, attention, none;
    feed-forwards: swiglu, gelu, none; without "+", ffn.kind), such as [mamba2, mamba2, attention+gelu].
    Or a string, one character per block: M mamba2, * attention, - a block of ffn.kind alone; "MMM*" means
    [mamba2, mamba2, mamba2, attention]. In a string with a "-" every feed-forward is written out, so M and *
    carry none: "M-*-" means [mamba2+none, none+swiglu, attention+none, none+swiglu]."""
    attention: AttentionConfig = AttentionConfig()
    """Of the blocks with attention."""
    mamba2: Mamba2Config = Mamba2Config()
    """Of the blocks with Mamba-2."""
    ffn: FFNConfig = FFNConfig()
    """Of the blocks with a feed-forward."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before mixers, feed-forwards and the head; layernorm has a bias."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance, in every norm of the model."""
    tie_embeddings: bool = False
    """The head uses the embedding's weight."""
    residual_scale: Literal["one", "depth", "learned"] = "one"
    """s of x + s * f(x): 1, 1/sqrt(2 * num_layers), or one learned value per channel that starts at 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the values of each residual branch set to zero in training."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; the last linear of a branch has 1/sqrt(2 * num_layers) of it,
    unless residual_scale is depth, which has the factor already."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        specs = set(self.layer_specs())
        if LayerSpec(None, None) in specs:
            raise ValueError(
                f"model.pattern={self.pattern!r} with model.ffn.kind={self.ffn.kind!r} has an empty block; "
                "name a mixer or a feed-forward in each item"
            )
        for mixer in sorted({spec.mixer for spec in specs if spec.mixer}):
            MIXERS[mixer].check(self)
        for ffn in sorted({spec.ffn for spec in specs if spec.ffn}):
            FEEDFORWARDS[ffn].check(self)
        return self

    def layer_specs(self) -> list[LayerSpec]:
        """The pattern, repeated over num_layers blocks. Raises ValueError for an item that does not parse."""
        if self.ffn.kind not in (*FEEDFORWARDS, NONE):
            raise ValueError(
                f"model.ffn.kind={self.ffn.kind!r} is unknown; use one of {_names(FEEDFORWARDS)}"
            )
        if isinstance(self.pattern, str):
            items = [_parse_character(char, self.pattern, self.ffn.kind) for char in self.pattern]
        else:
            items = [_parse_item(item, self.ffn.kind) for item in self.pattern]
        return [items[layer % len(items)] for layer in range(self.num_layers)]

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.attention.head_dim or self.hidden_size // self.attention.num_heads

    @property
    def mamba2_inner_size(self) -> int:
        """Inner channels of a Mamba-2 mixer."""
        return int(self.mamba2.expand * self.hidden_size)

    @property
    def mamba2_num_heads(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return self.mamba2_inner_size // self.mamba2.head_dim

    @property
    def branch_init_std(self) -> float:
        """Standard deviation of the initial last linear of a residual branch."""
        return self.init_std if self.residual_scale == "depth" else self.init_std * self.depth_scale

    @property
    def depth_scale(self) -> float:
        """1/sqrt(2 * num_layers): the sum of that many branches then has the variance of one."""
        return 1 / math.sqrt(2 * self.num_layers)


def require_divides(divisor_key: str, divisor: int, number_key: str, number: int) -> None:
    """Raises ValueError, naming both keys and the values that would do, unless divisor divides number."""
    if number % divisor:
        use = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
        raise ValueError(f"{divisor_key}={divisor} does not divide {number_key}={number}; use one of {use}")


def _parse_item(item: str, default_ffn: str) -> LayerSpec:
    """ "mixer" or "mixer+ffn" -> LayerSpec."""
    mixer, plus, ffn = item.partition("+")
    ffn = ffn if plus else default_ffn
    if mixer not in (*MIXERS, NONE):
        raise ValueError(
            f"model.pattern: mixer {mixer!r} of item {item!r} is unknown; use one of {_names(MIXERS)}"
        )
    if ffn not in (*FEEDFORWARDS, NONE):
        raise ValueError(
            f"model.pattern: feed-forward {ffn!r} of item {item!r} is unknown; "
            f"use one of {_names(FEEDFORWARDS)}"
        )
    return LayerSpec(None if mixer == NONE else mixer, None if ffn == NONE else ffn)


def _parse_character(char: str, pattern: str, default_ffn: str) -> LayerSpec:
    """One character of a pattern string -> LayerSpec."""
    if char == FEEDFORWARD_CHARACTER:
        return _parse_item(NONE, default_ffn)
    if char not in CHARACTERS:
        known = ", ".join(f"{c!r} ({name})" for c, name in CHARACTERS.items())
        raise ValueError(
            f"model.pattern={pattern!r}: character {char!r} is unknown; use {known}, "
            f"{FEEDFORWARD_CHARACTER!r} (feed-forward alone), or write a list of names"
        )
    return _parse_item(CHARACTERS[char], NONE if FEEDFORWARD_CHARACTER in pattern else default_ffn)


def _names(table: dict[str, Any]) -> str:
    return ", ".join((*table, NONE))
