"""From a run's configuration to its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.vision_config import VisionConfig
from triptych.training.objectives.diffusion import DiffusionObjective
from triptych.training.objectives.language import LanguageModeling
from triptych.training.objectives.protocol import Objective
from triptych.training.objectives.vision import VisionObjective

if TYPE_CHECKING:
    # training.config holds this package's sections, so at run time the arrow is the other one.
    from triptych.training.sections import RunSections


def build_objective(run: RunSections) -> Objective:
    """What the run's family of models is trained for.

    Raises ValueError where `train.objective`, `train.tread` or `train.tasks` does not fit the model.
    """
    if isinstance(run.model, DiffusionConfig):
        return DiffusionObjective(run.train.objective, run.model, run.train.tread)
    if isinstance(run.model, VisionConfig):
        return VisionObjective(run.model, run.train.tasks)
    return LanguageModeling()
