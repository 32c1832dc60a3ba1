"""What a family of models is trained for: `Objective`, and one implementation per family.

protocol: the interface. language: next tokens. diffusion: denoising, from its parts paths (alpha, sigma and
the convention of time), predictions (what an output means), times, weighting, variational (learned variances)
and draws (everything random). config: `train.objective` and `train.tread`.
"""

from triptych.training.objectives.build import build_objective
from triptych.training.objectives.config import ObjectiveConfig, TreadConfig
from triptych.training.objectives.diffusion import DiffusionObjective
from triptych.training.objectives.language import IGNORED, LanguageModeling
from triptych.training.objectives.protocol import Batch, Meter, Objective

__all__ = [
    "IGNORED",
    "Batch",
    "DiffusionObjective",
    "LanguageModeling",
    "Meter",
    "Objective",
    "ObjectiveConfig",
    "TreadConfig",
    "build_objective",
]
