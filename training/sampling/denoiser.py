"""From a model's outputs to what is thought to be image and what noise, with classifier-free guidance.

Shape legend: B samples (or rows of packed images), G images of a row, T tokens, C channels, P patch edge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from triptych.models.diffusion_config import DiffusionConfig
from triptych.training.objectives.config import ObjectiveConfig
from triptych.training.objectives.diffusion import check, split_output
from triptych.training.objectives.paths import build_path
from triptych.training.objectives.predictions import Prediction, from_output
from triptych.training.objectives.protocol import Batch
from triptych.training.sampling.config import GuidanceConfig

Conditioning = Mapping[str, Tensor]
"""What the model reads besides x and times: labels, text; in packed rows positions, document_ids, sizes
too."""


class Denoiser:
    """A trained model as a function of x_t and t, whatever its output means.

    predict: batch of x, times and conditioning -> outputs; x in `dtype`, in which samples are returned, too.
    Everything else is float64.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        model: DiffusionConfig,
        predict: Callable[[Batch], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raises ValueError where the objective does not fit the model."""
        check(objective, model)
        self.objective = objective
        self.model = model
        self.path = build_path(objective)
        self.dtype = dtype
        self._predict = predict

    def __call__(
        self, x: Tensor, t: float, conditioning: Conditioning, guidance: GuidanceConfig | None = None
    ) -> Prediction:
        """x: x_t in float64, (B, C, *space) or packed (B, T, C P P). t > 0, one time for all."""
        time = torch.tensor(t, dtype=torch.float64, device=x.device)
        images = conditioning["sizes"].shape[:2] if "document_ids" in conditioning else x.shape[:1]
        batch = {
            **conditioning,
            "x": (self.path.input_scale(time) * x).to(self.dtype),
            "times": self.path.embed(time).to(self.dtype).expand(images),
        }
        if guidance is not None and guidance.acts_at(t):
            output, variance = self._guided(batch, guidance)
        else:
            output, variance = self._outputs(batch)
        prediction = from_output(self.objective.predict, self.path, output, x, time)
        if variance is None or not self.objective.learn_sigma:
            return prediction
        return Prediction(prediction.x0, prediction.noise, variance)

    def _guided(self, batch: Batch, guidance: GuidanceConfig) -> tuple[Tensor, Tensor | None]:
        """Both evaluations in one call. All kinds of output are linear in x and output, so that guidance of
        the output is that of image, noise and velocity."""
        output, variance = self._outputs(doubled(batch, self.model.conditioning.num_classes))
        conditional, unconditional = output.chunk(2)
        mixed = unconditional + guidance.scale * (conditional - unconditional)
        if guidance.channels is not None:
            packed = "document_ids" in batch
            dim, count = (
                (2, guidance.channels * self.model.patch_elements) if packed else (1, guidance.channels)
            )
            rest = conditional.narrow(dim, count, conditional.shape[dim] - count)
            mixed = torch.cat([mixed.narrow(dim, 0, count), rest], dim=dim)
        return mixed, None if variance is None else variance.chunk(2)[0]

    def _outputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        output = self._predict(batch).double()
        return split_output(output, batch["x"].shape, self.model, packed="document_ids" in batch)


def doubled(batch: Batch, num_classes: int) -> Batch:
    """Every sample twice: as it is, and behind all of those without its label or text."""
    both = {name: torch.cat([value, value]) for name, value in batch.items()}
    for name, nothing in (("labels", num_classes), ("text", 0)):
        if name in batch:
            both[name][batch[name].shape[0] :] = nothing
    return both
