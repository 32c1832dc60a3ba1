"""`train.objective:` and `train.tread:`, what a denoiser is trained for; `train.tasks:`, of vision models.

t is 0 at the data and 1 at the noise everywhere in Triptych (`training/objectives/paths.py`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PathKind = Literal["linear", "gvp", "vp", "ddpm", "edm"]
PredictionKind = Literal["velocity", "noise", "score", "v", "x0", "edm"]

LARGEST_MODE_SCALE = 2 / (math.pi - 2)
"""Beyond it the mode transform is no longer monotone."""

# What is predicted where nothing is said.
_USUAL_PREDICTION = {"ddpm": "noise", "edm": "edm"}


class TimesConfig(BaseModel):
    """`train.objective.times:`, the distribution of the training times."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["uniform", "logit_normal", "mode", "edm"] = "uniform"
    """uniform: over [0, 1]. logit_normal: t = sigmoid(mean + std z), z standard normal. mode: more weight in
    the middle, by scale; both of Stable Diffusion 3 (arXiv 2403.03206). edm: sigma = exp(mean + std z) (arXiv
    2206.00364), the only one for path edm, and for no other."""
    mean: float | None = None
    """Of logit_normal (unset: 0; below 0 means nearer to the data) or of the logarithm of sigma (unset:
    -1.2)."""
    std: float | None = Field(default=None, gt=0)
    """Likewise, the standard deviation; unset: 1, or 1.2 for edm."""
    scale: float | None = None
    """Of mode, from -1 (the ends) over 0 (uniform) to 1.75 (the middle); unset: 1.29."""
    shift: float = Field(default=1.0, gt=0)
    """t is replaced by shift t / (1 + (shift - 1) t): above 1 moves times towards the noise, as larger images
    want it (arXiv 2403.03206, equation 23); 1: no change."""

    @model_validator(mode="after")
    def _check(self) -> TimesConfig:
        where = "train.objective.times"
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and self.kind not in ("logit_normal", "edm"):
                raise ValueError(
                    f"{where}.{key}={value} belongs to kind logit_normal or edm, not {self.kind}; remove it "
                    "or change the kind"
                )
        if self.scale is not None and self.kind != "mode":
            raise ValueError(
                f"{where}.scale={self.scale} belongs to kind mode, not {self.kind}; remove it or change "
                "the kind"
            )
        if self.scale is not None and not -1 <= self.scale <= LARGEST_MODE_SCALE:
            raise ValueError(
                f"{where}.scale={self.scale} is out of range; use -1 to {LARGEST_MODE_SCALE:.2f}"
            )
        if self.kind == "edm" and self.shift != 1:
            raise ValueError(
                f"{where}.shift={self.shift} is for times in [0, 1], not for kind edm; remove it"
            )
        return self


class EDMConfig(BaseModel):
    """`train.objective.edm:`, of path edm (arXiv 2206.00364, table 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the data."""
    sigma_min: float = Field(default=0.002, gt=0)
    """Where sampling ends, but for the last step to 0."""
    sigma_max: float = Field(default=80.0, gt=0)
    """Where sampling starts."""

    @model_validator(mode="after")
    def _check(self) -> EDMConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"train.objective.edm.sigma_min={self.sigma_min} is not below sigma_max={self.sigma_max}; "
                "lower it"
            )
        return self


class ObjectiveConfig(BaseModel):
    """`train.objective:`, how noise is laid over images and what is predicted from the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: PathKind = "linear"
    """alpha(t) and sigma(t) of x_t = alpha x0 + sigma noise. linear: 1 - t and t (flow matching). gvp: cosine
    and sine. vp: the continuous variance-preserving SDE, beta 0.1 to 20 (SiT's three, arXiv 2401.08740).
    ddpm: 1000 discrete steps, beta 1e-4 to 2e-2 (arXiv 2006.11239). edm: 1 and t, t from sigma_min to
    sigma_max."""
    predict: PredictionKind = "velocity"
    """What the model's output means: velocity dx/dt, the noise, the score of x_t, v = alpha noise - sigma x0
    (arXiv 2202.00512), the clean image x0, or edm's preconditioned image. Unset: velocity; noise for path
    ddpm; edm for path edm, which goes with no other."""
    learn_sigma: bool = False
    """The second half of twice as many output channels is the variance of the reverse step, between its two
    bounds, trained by the variational bound (arXiv 2102.09672); path ddpm alone. If it is false, a second
    half of the output is ignored, as in SiT."""
    times: TimesConfig = TimesConfig()
    """Which times are trained. Unset: uniform; for path edm, its own."""
    weighting: Literal["none", "min_snr"] = "none"
    """Of the squared error. none: the mean squared error of what is predicted; of score, of sigma times it,
    and of edm, that of its paper. min_snr: the squared error of x0 times min(SNR, gamma), SNR = alpha^2 /
    sigma^2, whatever is predicted (arXiv 2303.09556)."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """gamma of min_snr; unset: 5."""
    label_drop: float = Field(default=0.1, ge=0, le=1)
    """Share of the samples that are trained without their label or text, for classifier-free guidance."""
    edm: EDMConfig = EDMConfig()
    """Of path edm."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        path = filled.get("path")
        if isinstance(path, str) and path in _USUAL_PREDICTION:
            filled.setdefault("predict", _USUAL_PREDICTION[path])
        times = filled.get("times", {})
        if path == "edm" and isinstance(times, dict):
            filled["times"] = {"kind": "edm", **times}
        return filled

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        where = "train.objective"
        if (self.path == "edm") != (self.predict == "edm"):
            raise ValueError(
                f"{where}.path={self.path} and {where}.predict={self.predict}: edm's path and prediction go "
                "with each other only; set both to edm or neither"
            )
        if (self.path == "edm") != (self.times.kind == "edm"):
            raise ValueError(
                f"{where}.times.kind={self.times.kind} does not serve path {self.path}: kind edm is for path "
                "edm, and the others are for the others; change one"
            )
        if self.path == "ddpm" and self.predict == "velocity":
            raise ValueError(
                f"{where}.predict=velocity needs a path that is continuous in t, and ddpm has steps; use "
                "noise, v, x0 or score, or path: vp"
            )
        if self.learn_sigma and self.path != "ddpm":
            raise ValueError(
                f"{where}.learn_sigma=true is about the discrete steps of path ddpm, not of {self.path}; set "
                "learn_sigma: false (a second half of the output is then ignored) or path: ddpm"
            )
        if self.min_snr_gamma is not None and self.weighting != "min_snr":
            raise ValueError(
                f"{where}.min_snr_gamma={self.min_snr_gamma} belongs to weighting min_snr, not "
                f"{self.weighting}; remove it or set weighting: min_snr"
            )
        return self


class TreadConfig(BaseModel):
    """`train.tread:`, token routing in training (TREAD, arXiv 2501.04765)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: float = Field(default=0.5, gt=0, lt=1)
    """Share r of the N tokens of a sample that skip the blocks: N - int(N r) go through."""
    start: int = Field(default=2, ge=0)
    """First block that they skip, from 0."""
    end: int = Field(ge=1)
    """The block before which they come back; [start, end) are skipped."""

    @model_validator(mode="after")
    def _check(self) -> TreadConfig:
        if self.start >= self.end:
            raise ValueError(
                f"train.tread.start={self.start} is not before train.tread.end={self.end}; no block is "
                "skipped"
            )
        return self


class VisionTaskConfig(BaseModel):
    """`train.tasks.<name>:`, how a task of a vision model is trained; a task without one has the defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=1.0, ge=0)
    """Factor on the task's mean loss in the sum over tasks; with model.task_weighting=uncertainty on
    exp(-s) loss + s, where s is learned."""
    loss: Literal["ce", "bce"] = "ce"
    """Of classify. ce: softmax cross-entropy. bce: a sigmoid per class, summed over the classes (arXiv
    2110.00476; better with mixup)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of classify: share of the label that is spread over all classes (arXiv 1512.00567), in validation
    too."""
    dice: float = Field(default=0.0, ge=0)
    """Of segment: weight of 1 - Dice of each image's classes (arXiv 1606.04797) beside the cross-entropy."""
