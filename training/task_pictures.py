"""What a vision model says about some validation images, drawn after each validation."""

from __future__ import annotations

import torch

from triptych.data_pipeline.images import dataset as images
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.models import VisionConfig
from triptych.parallel.model import ParallelModel
from triptych.training.data import image_needs
from triptych.training.evaluation import prepare, to_device
from triptych.training.objectives import Objective
from triptych.training.objectives.vision.pictures import task_pictures
from triptych.training.pictures import Pictures
from triptych.training.sections import RunSections

COUNT = 8
"""Images of each task."""


class TaskPictures:
    """The same images each time; every rank sees all of them, for they compute together."""

    def __init__(self, run: RunSections, model: ParallelModel, objective: Objective) -> None:
        """Raises ValueError for validation data that cannot serve."""
        assert isinstance(run.model, VisionConfig), "the tasks of other models are not drawn"
        assert isinstance(run.data, ImageDataConfig), "vision models read images"
        size = run.train.global_batch_size
        rows = images.open_validation(run.data, image_needs(run), limit=COUNT, global_batch_size=size)
        assert rows is not None, "whoever validates has validation data"
        self.config, self.model, self.objective = run.model, model, objective
        self.batch = rows.collate([rows.sample(number) for number in range(len(rows))])

    def draw(self, step: int) -> dict[str, Pictures]:
        """A picture per task, by its name; nothing for packed rows. All ranks call it together."""
        (batch,) = prepare(self.objective, to_device([self.batch], self.model.device), step, training=False)
        outputs = self.model.predict(batch)
        (targets,) = to_device([batch["targets"]], torch.device("cpu"))
        outputs = [output.float().cpu() for output in outputs]
        return task_pictures(self.config, batch["x"].cpu(), outputs, targets, count=COUNT)
