"""The sections of a run's configuration that training owns: `train:`, `checkpoint:` and `log:`.

Every duration is a count of optimizer steps unless its line says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from triptych.training.ema import EMAConfig
from triptych.training.finetune import FinetuneConfig
from triptych.training.image_grids import ImageGridConfig
from triptych.training.objectives.config import ObjectiveConfig, TreadConfig, VisionTaskConfig

Precision = Literal["fp32", "bf16", "fp64"]


class OptimizerConfig(BaseModel):
    """`train.optimizer:`, AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate; the schedule multiplies it by a factor in [0, 1]."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled decay per unit of learning rate. It acts on matrices only: not on norms, biases, a_log, d,
    dt_bias, residual scales, nor on token and task embeddings (`training/optimizer.py` holds the rule)."""

    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Factor on the learning rate per layer from the head down to the embeddings, for finetuning (BEiT, arXiv
    2106.08254); 1: every layer learns at the same rate."""

    @model_validator(mode="after")
    def _check_betas(self) -> OptimizerConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"train.optimizer.betas={list(self.betas)}: each must be at least 0 and below 1")
        return self


class ScheduleConfig(BaseModel):
    """`train.schedule:`, the factor on the learning rate as a function of the step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up: cosine or linear descent to min_ratio, constant, or wsd = warm-up, stable,
    decay (1 - sqrt, Hägele et al., arXiv 2405.18392)."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up; 0 starts at the full rate."""
    min_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """The factor reached at the last step (not used by `constant`)."""
    decay: int | None = Field(default=None, ge=1)
    """Steps of the final decay, `wsd` only; null takes a fifth of train.steps."""

    @model_validator(mode="after")
    def _check_decay(self) -> ScheduleConfig:
        if self.decay is not None and self.kind != "wsd":
            raise ValueError(
                f"train.schedule.decay={self.decay} belongs to kind wsd, not {self.kind}; "
                "remove it or set train.schedule.kind=wsd"
            )
        return self


class TrainConfig(BaseModel):
    """`train:`, what is optimised, for how long and in which precision."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    """Optimizer steps in all; a resumed run goes on up to this number."""
    global_batch_size: int = Field(ge=1)
    """Samples (sequences) per optimizer step over all ranks."""
    micro_batch_size: int = Field(ge=1)
    """Samples per forward pass on one data rank."""
    seed: int = 0
    """Seeds initialisation, dropout and, unless data.seed is set, the order of the data."""
    precision: Precision = "fp32"
    """fp32; bf16 (parameters, moments and reductions stay fp32, matrix products run in bf16); fp64 (for
    verification)."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What a denoiser is trained for; language models have next-token prediction."""
    tasks: dict[str, VisionTaskConfig] = {}
    """How the tasks of a vision model are trained, by their names."""
    tread: TreadConfig | None = None
    """Part of a denoiser's tokens goes around some blocks in training; null: none does."""
    finetune: FinetuneConfig | None = None
    """Start from the parameters of another run; null: from initial values."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: globs of names in the whole model, such as "blocks.*", also with rows
    of dimension 0, such as "blocks.3.ffn.experts.up_proj[0:16]"."""
    ema: EMAConfig | None = None
    """Average of the parameters over the steps, kept beside them; null: none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this global L2 norm; null never clips."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps with a non-finite loss or gradient that are skipped (counted and reported) before the run is
    ended; 0 ends it at the first."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between two validations, which also happen after the last step; 0 never validates."""
    eval_samples: int = Field(default=64, ge=1)
    """Samples of the fixed validation set, the first ones of the validation order; of each source for
    vision."""

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={self.micro_batch_size} does not divide "
                f"train.global_batch_size={self.global_batch_size}; use one of "
                f"{', '.join(map(str, divisors(self.global_batch_size)))}"
            )
        decay = self.schedule.decay or 0
        if self.schedule.warmup + decay > self.steps:
            raise ValueError(
                f"train.schedule.warmup={self.schedule.warmup} and decay={decay} are together longer than "
                f"train.steps={self.steps}; shorten them"
            )
        return self


class CheckpointConfig(BaseModel):
    """`checkpoint:`, when the run's state is written, how many are kept and which is resumed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(default=0, ge=0)
    """Steps between two checkpoints; the last step is always saved; 0 saves only that one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk. With 1 a corrupt checkpoint has no older one to fall back to."""
    async_save: bool = True
    """Write in the background while training goes on; false waits for each checkpoint."""
    resume: str = "auto"
    """auto: go on from the newest valid checkpoint of the run directory, start afresh if it has none.
    never: start afresh, refuse a run directory that has checkpoints. Otherwise a path: of one checkpoint, or
    of a run whose newest is meant. A path elsewhere serves as long as the run directory has no checkpoint of
    its own; a path within the run directory goes back to exactly that one and sets newer ones aside."""


class ProfileConfig(BaseModel):
    """`log.profile:`, a trace of some steps by torch.profiler, one file per rank."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = Field(ge=1)
    """First step traced; later than 1 leaves warm-up effects out."""
    steps: int = Field(default=1, ge=1)
    """Steps traced."""


class LogConfig(BaseModel):
    """`log:`, what a run reports."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(default=1, ge=1)
    """Steps between two reports (progress line, metrics.jsonl, TensorBoard)."""
    tensorboard: bool = True
    """Write TensorBoard events to <run>/tensorboard."""
    images: ImageGridConfig | None = None
    """Images to draw while a denoiser trains, always from the same noise; null: none."""
    profile: ProfileConfig | None = None
    """Steps to trace into <run>/profile; null traces none."""


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
