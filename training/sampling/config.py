"""How images are drawn from a trained denoiser.

t is 0 at the data and 1 at the noise (`training/objectives/paths.py`); for path edm it is sigma.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GuidanceConfig(BaseModel):
    """`guidance:`, classifier-free guidance (arXiv 2207.12598): unconditional + scale * (conditional -
    unconditional)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(default=1.0, ge=0)
    """1: no guidance, one evaluation per step instead of two; 0: as if nothing were asked for."""
    interval: tuple[float, float] | None = None
    """Guidance acts where lowest <= t <= highest, [lowest, highest] (arXiv 2404.07724); unset: everywhere."""
    channels: int | None = Field(default=None, ge=1)
    """Guidance acts on the first so many channels, the others stay conditional; DiT and SiT use 3 of 4.
    Unset: all."""

    @model_validator(mode="after")
    def _check(self) -> GuidanceConfig:
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(
                f"guidance.interval={list(self.interval)} is no interval of t; use [lowest, highest] with "
                "0 <= lowest <= highest"
            )
        return self

    def acts_at(self, t: float) -> bool:
        """Whether two evaluations are needed at t."""
        inside = self.interval is None or self.interval[0] <= t <= self.interval[1]
        return self.scale != 1 and inside


class SamplerConfig(BaseModel):
    """Steps from noise to an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["euler", "heun", "ddim", "ddpm", "sde"] = "euler"
    """euler, heun: the probability-flow ODE at first and second order; on path edm, that paper's sampler.
    ddim: the same in steps that are exact if the predicted image is right (arXiv 2010.02502). ddpm:
    ancestral, with the learned variance if there is one. sde: the reverse SDE by Euler and Maruyama, as in
    SiT."""
    steps: int = Field(default=50, ge=1)
    """Steps from noise to image. Evaluations of the model: as many; heun takes two for all but the last."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Of ddim: share of ddpm's noise, 0 for none (deterministic) to 1."""
    shift: float = Field(default=1.0, gt=0)
    """Above 1: times lie closer at the noise (arXiv 2403.03206, equation 23). Not for paths ddpm and edm,
    which have steps of their own."""
    rho: float = Field(default=7.0, gt=0)
    """Of path edm: sigma^(1/rho) falls in equal steps (arXiv 2206.00364, equation 5)."""
    diffusion: Literal["sigma", "sbdm", "constant"] = "sigma"
    """Of sde, how much noise: w(t) in dx = (velocity - w score) dt + sqrt(2 w) dW. sigma(t); sbdm: that of
    the forward SDE, sigma sigma' - sigma^2 alpha' / alpha; or 1."""
    diffusion_scale: float = Field(default=1.0, ge=0)
    """Factor on it; 0 is the ODE."""
    last_step: float = Field(default=0.04, gt=0, lt=1)
    """Of sde on continuous paths: from this t the predicted image is taken, for the score is steep near 0."""
    clip: float | None = Field(default=None, gt=0)
    """Predicted images are clamped to [-clip, clip] in every step; 1 suits pixels, unset latents."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Stronger conditioning."""
    seed: int = 0
    """Sample number n of a seed is the same whatever is drawn with it."""

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        belongs = {"eta": "ddim", "diffusion": "sde", "diffusion_scale": "sde", "last_step": "sde"}
        for key, method in belongs.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default and self.method != method:
                raise ValueError(
                    f"{key}={value} belongs to method {method}, not {self.method}; remove it or set "
                    f"method={method}"
                )
        return self
