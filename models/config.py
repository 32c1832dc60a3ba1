"""Section `model:` of a run's configuration: what is built, never how it is cut or trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from triptych.models.init import Init, Normal, Xavier
from triptych.models.moe_config import AttentionMoEConfig, MoEConfig, ProductKeysConfig
from triptych.models.registry import CHARACTERS, FEEDFORWARD_CHARACTER, FEEDFORWARDS, MIXERS, NONE
from triptych.models.sections import (
    AttentionConfig,
    DimsumConfig,
    FFNConfig,
    Mamba1Config,
    Mamba2Config,
    MLSTMConfig,
    ScanConfig,
    Section,
    SS2DConfig,
    WKVConfig,
)


class LayerSpec(NamedTuple):
    """What stands in one block: names in the registry, or None for nothing."""

    mixer: str | None
    ffn: str | None

    @property
    def kind(self) -> str:
        """The block's kind as a pattern item, such as "mamba2+swiglu"."""
        return f"{self.mixer or NONE}+{self.ffn or NONE}"


class ModelConfig(Section):
    """What every family has: a stack of blocks after a pattern. A family adds its two ends."""

    causal: ClassVar[bool]
    """Whether attention looks back only."""

    family: str
    """Which family of models."""
    size: str | None = None
    """Name of an entry of `sizes` whose keys are taken where they are not given."""
    sizes: dict[str, dict[str, Any]] = Field(default={})
    """Sizes by name, such as XL: {num_layers: 28, hidden_size: 1152}; gone once the configuration is read."""
    hidden_size: int = Field(ge=1)
    """Channels of the residual stream."""
    num_layers: int = Field(ge=1)
    """Blocks; the pattern is repeated over them and may end in its middle."""
    pattern: str | list[str] = Field(default=["attention"], min_length=1)
    """What stands in the blocks. A list of items "mixer" or "mixer+ffn" (mixers: attention, cross_attention,
    attention_moe, mamba1, mamba2, wkv, dimsum, ss2d, mlstm, pool, none; feed-forwards: swiglu, gelu,
    channel_mix, moe, product_keys, none; without "+", ffn.kind), such as [mamba2, mamba2, attention+gelu].
    Or a string, one character per block: M mamba2, m mamba1, * attention, x cross_attention, e attention_moe,
    W wkv, D dimsum, S ss2d, l mlstm, p pool, - a block of ffn.kind alone; "MMM*" means [mamba2, mamba2,
    mamba2, attention]. In a string with a "-" every feed-forward is written out, so M and * carry none:
    "M-*-" means [mamba2+none, none+swiglu, attention+none, none+swiglu]."""
    attention: AttentionConfig = AttentionConfig()
    """Of the blocks with attention or cross-attention."""
    mamba1: Mamba1Config = Mamba1Config()
    """Of the blocks with Mamba-1, also within dimsum."""
    mamba2: Mamba2Config = Mamba2Config()
    """Of the blocks with Mamba-2."""
    wkv: WKVConfig = WKVConfig()
    """Of the blocks with WKV."""
    dimsum: DimsumConfig = DimsumConfig()
    """Of the blocks with DiMSUM's mixer."""
    ss2d: SS2DConfig = SS2DConfig()
    """Of the blocks with VMamba's cross scan."""
    mlstm: MLSTMConfig = MLSTMConfig()
    """Of the blocks with mLSTM."""
    ffn: FFNConfig = FFNConfig()
    """Of the blocks with a feed-forward."""
    moe: MoEConfig = MoEConfig()
    """Of the blocks with feed-forward moe."""
    attention_moe: AttentionMoEConfig = AttentionMoEConfig()
    """Of the blocks with attention_moe."""
    product_keys: ProductKeysConfig = ProductKeysConfig()
    """Of the blocks with feed-forward product_keys."""
    scan: ScanConfig | None = None
    """How mamba1, mamba2 and mlstm go through an image; language models have none."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before mixers, feed-forwards and the head, and of attention's qk_norm; layernorm has a bias."""
    norm_affine: bool = True
    """Whether those norms have weights of their own (where they are modulated they need none)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance, in every norm of the model."""
    residual_scale: Literal["one", "depth", "learned"] = "one"
    """s of x + s * f(x): 1, 1/sqrt(2 * num_layers), or one learned value per channel that starts at 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the values of each residual branch set to zero in training."""
    init: Literal["normal", "xavier"] = "normal"
    """Initial weights of the linears of mixers and feed-forwards: normal with init_std, or Xavier-uniform."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; the last linear of a branch has 1/sqrt(2 * num_layers) of it,
    unless residual_scale is depth, which has the factor already."""

    @model_validator(mode="before")
    @classmethod
    def _take_size(cls, values: Any) -> Any:
        return take_size(values)

    @model_validator(mode="after")
    def _check_pattern(self) -> ModelConfig:
        if self.size is not None:
            raise ValueError(f"model.size={self.size!r} needs model.sizes, a mapping of sizes by name")
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
        return self._repeated(self.num_layers)

    def _repeated(self, count: int) -> list[LayerSpec]:
        """The pattern, repeated over `count` blocks."""
        if isinstance(self.pattern, str):
            items = [_parse_character(char, self.pattern, self.ffn.kind) for char in self.pattern]
        else:
            items = [_parse_item(item, self.ffn.kind) for item in self.pattern]
        return [items[layer % len(items)] for layer in range(count)]

    @property
    def stage_configs(self) -> tuple[ModelConfig, ...]:
        """The configuration of each stage of blocks; one outside hierarchical backbones."""
        return (self,)

    def stage_of(self, layer: int) -> int:
        """Number of the stage that block `layer` is in."""
        return 0

    def length_at(self, layer: int, length: int) -> int:
        """Tokens that block `layer` sees of a sequence that begins with `length`."""
        return length

    @property
    def task_names(self) -> tuple[str, ...]:
        """Tasks that rows may belong to, in the order of their numbers."""
        return ("",)

    @property
    def rope_axes(self) -> int:
        """How many coordinates of a token rotate queries and keys; 0: no rotary positions."""
        return 0 if self.attention.rope_theta is None else 1

    def linear_init(self, fan_out: int, fan_in: int, *, last: bool = False) -> Init:
        """Of a linear's weight (fan_out, fan_in). last: of the last linear of a residual branch."""
        if self.init == "xavier":
            return Xavier(fan_out, fan_in)
        return Normal(self.branch_init_std if last else self.init_std)

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


class LanguageConfig(ModelConfig):
    """Language model: embedding, blocks, norm and head."""

    causal: ClassVar[bool] = True

    family: Literal["lm"] = "lm"
    """Language model."""
    vocab_size: int = Field(ge=2)
    """Rows of the embedding and of the head."""
    tie_embeddings: bool = False
    """The head uses the embedding's weight."""

    @model_validator(mode="after")
    def _check_language(self) -> LanguageConfig:
        if self.scan is not None:
            raise ValueError("model.scan orders the tokens of images; remove it from a language model")
        return self


def take_size(values: Any) -> Any:
    """A model's values with those of `sizes[size]` beneath them, and without both keys.

    Raises ValueError for a size that is not there.
    """
    if not isinstance(values, dict) or not isinstance(values.get("sizes"), dict):
        return values
    size, sizes = values.get("size"), values["sizes"]
    rest = {key: value for key, value in values.items() if key not in ("size", "sizes")}
    if size is None:
        return rest
    if not isinstance(sizes.get(size), dict):
        raise ValueError(f"model.size={size!r} is not among model.sizes; use one of {', '.join(sizes)}")
    return beneath(sizes[size], rest)


def require_divides(divisor_key: str, divisor: int, number_key: str, number: int) -> None:
    """Raises ValueError, naming both keys and the values that would do, unless divisor divides number."""
    if number % divisor:
        use = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
        raise ValueError(f"{divisor_key}={divisor} does not divide {number_key}={number}; use one of {use}")


def beneath(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `base`, mappings key by key."""
    merged = {**base, **values}
    for key in base.keys() & values.keys():
        if isinstance(base[key], Mapping) and isinstance(values[key], Mapping):
            merged[key] = beneath(base[key], values[key])
    return merged


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
