"""Section `model:` of vision backbones."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from triptych.models.config import LayerSpec, ModelConfig, beneath, require_divides, take_size
from triptych.models.scan_order import line_ends, scan_order
from triptych.models.sections import AttentionConfig, FFNConfig, ScanConfig, Section

SCANNING = ("mamba1", "mamba2", "wkv", "ss2d", "mlstm", "pool")
"""Mixers that ask where a token stands: they have no place for a class token or registers."""


class TaskConfig(Section):
    """One task: the head on the backbone, and what its samples carry."""

    kind: Literal["classify", "segment", "detect", "contrast"]
    """classify: a class per image. segment: a class per pixel. detect: boxes with classes, anchor-free.
    contrast: which embedded text belongs to which image (arXiv 2103.00020, 2111.07991)."""
    num_classes: int | None = Field(default=None, ge=1)
    """Classes, numbered from 0; contrast has none."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Channels within the heads of segment and detect; unset: those of the backbone's last stage."""
    stride: int | None = Field(default=None, ge=1)
    """For segment: pixels per cell of the map of logits, a divisor of the patch; unset: a patch, but at most
    4."""
    embed_size: int = Field(default=256, ge=1)
    """For contrast: channels in which image and text are compared."""
    text_size: int = Field(default=768, ge=1)
    """For contrast: channels of an embedded text's tokens."""
    text_length: int = Field(default=77, ge=1)
    """For contrast: tokens of an embedded text."""

    @model_validator(mode="after")
    def _classes(self) -> TaskConfig:
        if (self.num_classes is None) != (self.kind == "contrast"):
            what = "has no classes; remove it" if self.kind == "contrast" else "needs it; give their number"
            raise ValueError(f"num_classes={self.num_classes}: a task of kind {self.kind} {what}")
        if self.stride is not None and self.kind != "segment":
            raise ValueError(f"stride={self.stride} is for tasks of kind segment, not {self.kind}; remove it")
        return self

    @property
    def dense(self) -> bool:
        """Whether the head reads a map rather than one vector per image."""
        return self.kind in ("segment", "detect")


class VisionConfig(ModelConfig):
    """Vision backbone with a head per task: stem, blocks in one or several stages, norm, heads."""

    causal: ClassVar[bool] = False

    family: Literal["vision"] = "vision"
    """Vision backbone."""
    timm: str | None = None
    """Name of a timm backbone to take in place of stem and blocks, such as swin_tiny_patch4_window7_224; then
    hidden_size and num_layers are not given, and classification reads what timm's own classifier would. It
    has no batch norm, and data sharding alone serves it."""
    num_layers: int = Field(ge=1)
    """Blocks of all stages; with stages it may be left out."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of the pixels."""
    input_size: tuple[int, ...] = Field(min_length=1, max_length=3)
    """Pixels along each axis, such as [224, 224], or [frames, height, width] for video."""
    patch_size: int | tuple[int, ...] = Field(default=16)
    """Pixels per token along each axis; one number for all."""
    stem: Literal["patch", "conv"] = "patch"
    """patch: a linear of each patch. conv: two overlapping 3 x 3 convolutions of stride 2 (VMamba),
    patch_size 4."""
    stages: tuple[dict[str, Any], ...] = ()
    """Hierarchical backbones: per stage `depth`, `hidden_size` and other keys of this section that differ,
    such
    as attention: {num_heads: 3}; each stage halves the grid of the one before. Empty: one stage."""
    downsample: Literal["conv", "merge"] = "conv"
    """Between stages. conv: 3 x 3 convolution of stride 2 and a norm; merge: norm and linear of 2 x 2 tokens
    (Swin)."""
    position: Literal["sincos", "learned", "rope", "none"] = "learned"
    """Added tables, rotary positions along each axis, or none."""
    class_token: bool = False
    """A learned token in front, which classification reads; false: the mean of the tokens."""
    registers: int = Field(default=0, ge=0)
    """Learned tokens behind the class token that no head reads (arXiv 2309.16588)."""
    scan: ScanConfig = ScanConfig()
    """How scan mixers go through the tokens."""
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """Tasks by name; a data source names the one its samples are for."""
    task_weighting: Literal["fixed", "uncertainty"] = "fixed"
    """fixed: train.tasks' weights. uncertainty: a learned variance per task besides (arXiv 1705.07115)."""
    task_embedding: bool = False
    """A learned vector per task, zero at first, is added to every token."""
    ffn: FFNConfig = FFNConfig(kind="gelu", bias=True)
    """Of the blocks with a feed-forward."""
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    """Norm before mixers, feed-forwards and heads."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance, in every norm of the model."""
    stage: int | None = Field(default=None, exclude=True, repr=False)
    """Which stage this is the configuration of; not for users."""

    @model_validator(mode="before")
    @classmethod
    def _fill_stages(cls, values: Any) -> Any:
        """hidden_size and num_layers as the stages say; timm has its own."""
        values = take_size(values)
        if not isinstance(values, dict):
            return values
        if values.get("timm") is not None:
            return {"hidden_size": 1, "num_layers": 1, "position": "none", "class_token": True, **values}
        stages = values.get("stages") or ()
        if stages and all(
            isinstance(stage, dict) and isinstance(stage.get("depth"), int) for stage in stages
        ):
            values = {"num_layers": sum(stage["depth"] for stage in stages), **values}
            last = stages[-1].get("hidden_size")
            values = {"hidden_size": last, **values} if last is not None else values
        return values

    @field_validator("input_size", mode="before")
    @classmethod
    def _one_edge(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @field_validator("stages")
    @classmethod
    def _sized(cls, stages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for number, stage in enumerate(stages):
            depth, size = stage.get("depth"), stage.get("hidden_size")
            if not (isinstance(depth, int) and depth > 0 and isinstance(size, int) and size > 0):
                raise ValueError(
                    f"model.stages[{number}]={stage} needs depth and hidden_size, both at least 1; give both"
                )
        return stages

    @field_validator("ffn", mode="before")
    @classmethod
    def _usual_kind(cls, value: object) -> object:
        # Who sets the size of the feed-forward alone keeps the kind.
        if isinstance(value, dict) and "kind" not in value:
            return {"kind": "gelu", "bias": True, **value}
        return value

    @model_validator(mode="after")
    def _check_vision(self) -> VisionConfig:
        if isinstance(self.patch_size, tuple) and len(self.patch_size) != len(self.input_size):
            raise ValueError(
                f"model.patch_size={list(self.patch_size)} has {len(self.patch_size)} numbers and "
                f"model.input_size={list(self.input_size)} has {len(self.input_size)}; give one for each axis"
            )
        if self.timm is not None:
            return self._check_timm()
        for axis, (size, patch) in enumerate(zip(self.input_size, self.patch_sizes)):
            require_divides("model.patch_size", patch, f"model.input_size[{axis}]", size)
        if self.stem == "conv" and len(self.input_size) != 2:
            raise ValueError(
                f"model.stem=conv convolves images, and model.input_size={list(self.input_size)} has "
                f"{len(self.input_size)} dimension(s); use stem: patch"
            )
        if self.stem == "conv" and (self.patch_sizes != (4, 4) or self.position == "learned"):
            raise ValueError(
                f"model.stem=conv takes images in steps of 4 pixels and adds no positions, and patch_size="
                f"{self.patch_size}, position={self.position}; set patch_size: 4 and position: none or rope"
            )
        if self.stages and self.stage is None:
            self._check_stages()
        else:
            self._check_grid()
        return self

    def _check_stages(self) -> None:
        total = sum(stage["depth"] for stage in self.stages)
        if total != self.num_layers:
            raise ValueError(
                f"model.num_layers={self.num_layers} is not the sum {total} of the depths of model.stages; "
                "leave num_layers out"
            )
        if self.hidden_size != self.stages[-1]["hidden_size"]:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not that of the last stage, "
                f"{self.stages[-1]['hidden_size']}; leave hidden_size out"
            )
        if self.num_prefix_tokens:
            raise ValueError(
                "model.class_token and model.registers have no place on the grid that model.stages halves; "
                "use class_token: false and registers: 0"
            )
        for number in range(1, len(self.stages)):
            before = self.grid_of(number - 1)
            if any(size % 2 for size in before):
                raise ValueError(
                    f"model.stages[{number}] halves the grid {list(before)} of the stage "
                    f"before it, which is odd; change model.input_size={list(self.input_size)} or drop stages"
                )
        if self.stages and len(self.grid) != 2:
            raise ValueError(
                f"model.stages need images, and model.input_size={list(self.input_size)} has "
                f"{len(self.grid)} dimension(s); remove stages"
            )
        assert len(self.stage_configs) == len(self.stages), "every stage is a valid configuration"

    def _check_grid(self) -> None:
        """What concerns the tokens of one stage."""
        mixers = {spec.mixer for spec in self.layer_specs() if spec.mixer}
        scanning = sorted(mixers.intersection(SCANNING))
        if self.wkv.shift == "quad" and any(spec.ffn == "channel_mix" for spec in self.layer_specs()):
            scanning = [*scanning, "channel_mix"]
        if scanning and self.num_prefix_tokens:
            raise ValueError(
                f"model.class_token and model.registers have no place on the grid that {scanning[0]} goes "
                "through; use class_token: false and registers: 0"
            )
        for order in self.scan.orders if scanning else ():
            scan_order(order, self.grid)
            if self.scan.line_ends:
                line_ends(order, self.grid)
        axes = len(self.grid)
        if self.position == "sincos" and self.hidden_size % (2 * axes):
            raise ValueError(
                f"model.position=sincos needs model.hidden_size={self.hidden_size} to be a multiple of "
                f"{2 * axes}; change it or use position: learned"
            )
        if "attention" in mixers and self.attention.window is not None:
            raise ValueError(
                f"model.attention.window={self.attention.window} looks back only, and images are seen both "
                "ways; remove it"
            )
        heads = {"attention": self.head_dim, "attention_moe": self.attention_moe.head_dim}
        for mixer in mixers.intersection(heads) if self.rope_axes else ():
            if self.attention.rope_theta is None or heads[mixer] % (2 * axes):
                raise ValueError(
                    f"model.position=rope turns the {heads[mixer]} channels of each head of {mixer} in "
                    f"pairs for each of {axes} axes by model.attention.rope_theta="
                    f"{self.attention.rope_theta}; use a multiple of {2 * axes} and a rope_theta"
                )

    def _check_timm(self) -> VisionConfig:
        if self.stages or self.registers or self.task_embedding or not self.class_token:
            raise ValueError(
                f"model.timm={self.timm} brings its own tokens and stages; remove stages, class_token, "
                "registers and task_embedding"
            )
        return self

    @functools.cached_property
    def _timm_shape(self) -> Any:
        """Channels and grids that a backbone of timm gives."""
        from triptych.models.timm_backbone import timm_shape

        return timm_shape(self)

    def layer_specs(self) -> list[LayerSpec]:
        """The pattern over all blocks; it begins anew with each stage."""
        if self.timm is not None:
            return []
        if not self.stages:
            return super().layer_specs()
        depths = [stage["depth"] for stage in self.stages]
        return [spec for config, depth in zip(self.stage_configs, depths) for spec in config._repeated(depth)]

    @functools.cached_property
    def stage_configs(self) -> tuple[VisionConfig, ...]:
        """The configuration of each stage: its own sizes, this one's number of layers."""
        if self.timm is not None:
            sizes = [{"hidden_size": size, "stage": n} for n, size in enumerate(self._timm_shape.channels)]
            return tuple(self.model_copy(update=size) for size in sizes)
        if not self.stages:
            return (self,)
        base = self.model_dump(exclude_unset=True, exclude={"stages", "hidden_size", "num_layers"})
        found = []
        for number, stage in enumerate(self.stages):
            own = {key: value for key, value in stage.items() if key != "depth"}
            values = beneath(_without_filled(base, own), own)
            rest = {"num_layers": self.num_layers, "stage": number}
            found.append(VisionConfig.model_validate({**values, **rest}))
        return tuple(found)

    def stage_of(self, layer: int) -> int:
        """Number of the stage that block `layer` is in."""
        last = 0
        for number, stage in enumerate(self.stages):
            last += stage["depth"]
            if layer < last:
                return number
        return max(0, len(self.stages) - 1)

    def first_layer(self, stage: int) -> int:
        """The first block of a stage."""
        return sum(each["depth"] for each in self.stages[:stage])

    def length_at(self, layer: int, length: int) -> int:
        """Tokens that block `layer` sees of a sequence that begins with `length`."""
        return length >> (len(self.input_size) * self.stage_of(layer))

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks in the order of their numbers."""
        return tuple(self.tasks)

    @property
    def has_dense_tasks(self) -> bool:
        """Whether some head reads maps."""
        return any(task.dense for task in self.tasks.values())

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of the grid."""
        return int(self.class_token) + self.registers

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """Pixels per token along each axis, in the first stage."""
        if self.timm is not None and self.has_dense_tasks:
            return tuple(size // cells for size, cells in zip(self.input_size, self._timm_shape.grids[0]))
        patch = self.patch_size
        return patch if isinstance(patch, tuple) else (patch,) * len(self.input_size)

    def grid_of(self, stage: int) -> tuple[int, ...]:
        """Tokens of a stage along each axis."""
        return tuple(size // patch >> stage for size, patch in zip(self.input_size, self.patch_sizes))

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis, of the first stage or the one that this is the configuration of."""
        return self.grid_of(self.stage or 0)

    @property
    def num_tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def patch_elements(self) -> int:
        """Positions within a patch; a token has in_channels values for each."""
        return math.prod(self.patch_sizes)

    @property
    def dense_stride(self) -> int:
        """Pixels per cell of the maps that dense heads give: the largest divisor of a patch up to 4."""
        edge = math.gcd(*self.patch_sizes)
        return next(stride for stride in (4, 3, 2, 1) if edge % stride == 0)

    def stride_of(self, task: TaskConfig) -> int:
        """Pixels per cell of the map of a dense task."""
        return task.stride or self.dense_stride

    @property
    def rope_axes(self) -> int:
        """One per axis of the grid with rope."""
        return len(self.input_size) if self.position == "rope" else 0


def _without_filled(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` without the number of key-value heads that followed from a number of heads that `own`
    replaces."""
    attention, mine = base.get("attention"), own.get("attention", {})
    if (
        not attention
        or "num_heads" not in mine
        or attention.get("num_kv_heads") != attention.get("num_heads", AttentionConfig().num_heads)
    ):
        return base
    kept = {key: value for key, value in attention.items() if key != "num_kv_heads"}
    return {**base, "attention": kept}
