"""Section `model:` of diffusion backbones."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from triptych.models.config import LayerSpec, ModelConfig, require_divides
from triptych.models.registry import MIXERS
from triptych.models.scan_order import line_ends, scan_order
from triptych.models.sections import FFNConfig, ScanConfig, Section


class ConditioningConfig(Section):
    """What a denoiser is told besides the time."""

    kind: Literal["class", "text", "none"] = "class"
    """class: a label; text: an embedded text, which cross_attention blocks read; none: nothing."""
    num_classes: int = Field(default=1000, ge=1)
    """Labels are 0 .. num_classes - 1; one more row of the table stands for "no label"."""
    text_size: int = Field(default=768, ge=1)
    """Channels of an embedded text's tokens."""
    text_length: int = Field(default=77, ge=1)
    """Tokens of an embedded text."""


class ModulationConfig(Section):
    """How conditioning acts on the blocks: shift, scale and gate of each branch (adaLN, arXiv 2212.09748)."""

    kind: Literal["zero", "lora"] = "zero"
    """zero: a linear per block, zero at first (adaLN-Zero). lora: a low-rank one per block plus a full one
    that all blocks share (FiTv2, arXiv 2410.13925)."""
    rank: int = Field(default=64, ge=1)
    """Rank of the blocks' own part, for lora."""


class RopeScalingConfig(Section):
    """Rotary positions beyond the size that was trained, height and width apart."""

    kind: Literal["none", "ntk", "yarn"] = "none"
    """none: positions go on as they are. ntk: a larger base (arXiv 2402.12376). yarn: low frequencies are
    stretched, high ones kept (arXiv 2309.00071)."""
    trained: tuple[int, ...] | None = None
    """Largest grid in training, in tokens; unset: the grid of input_size. A grid of no more tokens than that,
    at whatever aspect, is taken as trained."""


class DiffusionConfig(ModelConfig):
    """Denoiser of images (or of signals of 1 or 3 dimensions): patches, blocks, norm and head."""

    causal: ClassVar[bool] = False

    family: Literal["diffusion"] = "diffusion"
    """Diffusion backbone."""
    in_channels: int = Field(ge=1)
    """Channels of the pixels or latents."""
    out_channels: int | None = Field(default=None, ge=1)
    """Channels predicted; unset: in_channels. Twice in_channels with a learned variance."""
    input_size: tuple[int, ...] = Field(min_length=1, max_length=3)
    """Size of an input, such as [32, 32], in pixels or latents; with rope other sizes serve as well."""
    patch_size: int = Field(default=2, ge=1)
    """Edge of the square patch that makes a token."""
    position: Literal["sincos", "learned", "rope", "none"] = "sincos"
    """sincos: a fixed table added to the tokens; learned: a learned one; rope: rotary positions, an equal
    part of each head's channels per axis; none: only scans know of places."""
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    """For rope, at sizes beyond the trained."""
    conditioning: ConditioningConfig = ConditioningConfig()
    """What the denoiser is told."""
    modulation: ModulationConfig = ModulationConfig()
    """How it is told."""
    scan: ScanConfig = ScanConfig()
    """How mamba1 and mamba2 go through the tokens."""
    long_skips: bool = False
    """Block i of the first half also feeds block num_layers - 1 - i (U-ViT, arXiv 2209.12152)."""
    local_convs: bool = False
    """A 3 x 3 depthwise convolution over the tokens before the first block and after the last (DiM)."""
    shared_block_every: int = Field(default=0, ge=0)
    """After so many blocks stands an attention block whose weights all its places share (DiMSUM); 0: none."""
    ffn: FFNConfig = FFNConfig(kind="gelu", bias=True)
    """Of the blocks with a feed-forward."""
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    """Norm before mixers, feed-forwards and the head, and of attention's qk_norm."""
    norm_affine: bool = False
    """Whether those norms have weights of their own besides the modulation."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance, in every norm of the model."""
    init: Literal["normal", "xavier"] = "xavier"
    """Initial weights of linears: normal with init_std, or Xavier-uniform. Embeddings are normal; modulation
    and head are zero."""

    @field_validator("input_size", mode="before")
    @classmethod
    def _one_edge(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @field_validator("ffn", mode="before")
    @classmethod
    def _usual_kind(cls, value: object) -> object:
        # Who sets the size of the feed-forward alone keeps the kind.
        return (
            {"kind": "gelu", "bias": True, **value}
            if isinstance(value, dict) and "kind" not in value
            else value
        )

    @model_validator(mode="after")
    def _check_diffusion(self) -> DiffusionConfig:
        for axis, size in enumerate(self.input_size):
            require_divides("model.patch_size", self.patch_size, f"model.input_size[{axis}]", size)
        for order in self.scan.orders:
            scan_order(order, self.grid)
            if self.scan.line_ends:
                line_ends(order, self.grid)
        if self.local_convs and len(self.grid) != 2:
            raise ValueError(
                f"model.local_convs=true needs images, and model.input_size={list(self.input_size)} has "
                f"{len(self.grid)} dimension(s); use local_convs: false"
            )
        if self.position == "sincos" and self.hidden_size % (2 * len(self.grid)):
            raise ValueError(
                f"model.position=sincos needs model.hidden_size={self.hidden_size} to be a multiple of "
                f"{2 * len(self.grid)}; change it or use position: learned"
            )
        self._check_attention()
        self._check_text()
        return self

    def _check_attention(self) -> None:
        attends = any(spec.mixer == "attention" for spec in self.layer_specs())
        if self.shared_block_every:
            MIXERS["attention"].check(self)
            attends = True
        if not attends:
            return
        if self.attention.window is not None:
            raise ValueError(
                f"model.attention.window={self.attention.window} looks back only, and a denoiser looks both "
                "ways; remove it"
            )
        axes = self.rope_axes
        if axes and self.attention.rope_theta is None:
            raise ValueError(
                "model.position=rope with model.attention.rope_theta=null turns nothing; give a rope_theta, "
                "or use position: none"
            )
        if axes and self.head_dim % (2 * axes):
            raise ValueError(
                f"model.position=rope needs channels per head ({self.head_dim}) in pairs for each of {axes} "
                f"axes; use a multiple of {2 * axes} (hidden_size / num_heads)"
            )
        trained = self.rope_scaling.trained
        if axes and trained is not None and (len(trained) != axes or min(trained) < 1):
            raise ValueError(
                f"model.rope_scaling.trained={list(trained)} must be {axes} numbers of tokens, as "
                f"model.input_size={list(self.input_size)} has {axes}"
            )

    def _check_text(self) -> None:
        reads = any(spec.mixer == "cross_attention" for spec in self.layer_specs())
        if self.conditioning.kind == "text" and not reads:
            raise ValueError(
                f"model.conditioning.kind=text, and no block of model.pattern={self.pattern!r} reads the "
                "text; add a cross_attention to the pattern, or use kind: class or none"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return tuple(size // self.patch_size for size in self.input_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of an input of input_size."""
        return math.prod(self.grid)

    @property
    def patch_elements(self) -> int:
        """Positions within a patch; a token has in_channels values for each."""
        return self.patch_size ** len(self.input_size)

    @property
    def predicted_channels(self) -> int:
        """Channels of the output."""
        return self.out_channels or self.in_channels

    @property
    def rope_axes(self) -> int:
        """One per axis of the grid with rope."""
        return len(self.input_size) if self.position == "rope" else 0

    def skips_from(self, layer: int) -> int | None:
        """The earlier block whose output block `layer` takes in, if any."""
        source = self.num_layers - 1 - layer
        return source if self.long_skips and source < layer else None

    def followed_by_shared(self, layer: int) -> bool:
        """Whether the shared block stands behind block `layer`."""
        return bool(self.shared_block_every) and (layer + 1) % self.shared_block_every == 0

    @property
    def shared_spec(self) -> LayerSpec:
        """What the shared block is made of."""
        return LayerSpec("attention", "gelu")
