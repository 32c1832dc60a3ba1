"""Drawing images from a trained denoiser.

config: the choices. denoiser: outputs as predictions, with guidance. solvers: one step of each method. draw:
all steps, with noise that belongs to each sample.
"""

from triptych.training.sampling.config import GuidanceConfig, SamplerConfig
from triptych.training.sampling.denoiser import Denoiser
from triptych.training.sampling.draw import draw, sample_keys

__all__ = ["Denoiser", "GuidanceConfig", "SamplerConfig", "draw", "sample_keys"]
