"""All heads of a vision model.

Shape legend: B rows, T tokens, C hidden size, G images of a packed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from triptych.models.context import Context
from triptych.models.heads.contrast import Contrast
from triptych.models.heads.dense import Detect, Segment
from triptych.models.heads.pooled import Classify, pool, pool_packed
from triptych.models.init import ZEROS, Init
from triptych.models.linear import unset
from triptych.models.vision_config import VisionConfig

KINDS = {"classify": Classify, "segment": Segment, "detect": Detect, "contrast": Contrast}
CONTRAST_FIGURES = 2
"""Loss and hit of a sample."""
BOX_FIGURES = 5
"""Four sides and the centerness, behind the classes of a cell."""


class Heads(nn.Module):
    """One head per task, `heads.<task>`, each of which runs on every sample.

    So all ranks do the same work whatever tasks their samples are for. With model.task_weighting=uncertainty
    there is also log_variance: (tasks,), zero at first, s = log sigma^2 of each task (arXiv 1705.07115).
    """

    sequence = "exit"

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        for name, task in config.tasks.items():
            if name == "log_variance" or "." in name or not name or hasattr(self, name):
                raise ValueError(f"model.tasks.{name}: a task cannot have this name; choose another")
            self.add_module(name, KINDS[task.kind](config, task))
        uncertain = config.task_weighting == "uncertainty"
        self.log_variance = unset(len(config.tasks)) if uncertain else None

    def init(self) -> dict[str, Init]:
        return {} if self.log_variance is None else {"log_variance": ZEROS}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence of so many tokens in the first stage."""
        heads: Any = [self.get_submodule(name) for name in self.config.tasks]
        return sum(head.flops(length) for head in heads)

    def forward(
        self,
        features_BTC: torch.Tensor,
        *earlier: torch.Tensor,
        context: Context,
        grid: tuple[int, ...] | None,
        text: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """features: normed tokens of the last stage, prefix tokens in front. earlier: tokens of the stages
        before it, first to last, where dense tasks read them. grid: tokens along each axis of the last stage;
        None: packed rows, which the context tells apart. text: (B, L, E). valid: (B,) or (B, G), False for
        images that could not be read; None: all could.

        Returns per task, in their order: classify (B, classes) or (B, G, classes); segment (B, classes, h, w)
        of cells of config.stride_of(task) pixels; detect (B, h w, classes + 5), see Detect; contrast (B, 2),
        loss and hit; and then, if learned, log_variance.
        Raises ValueError for packed rows with other tasks than classify, and contrast without text.
        """
        pooled = self._pooled(features_BTC, context, grid, valid)
        outputs = []
        for number, (name, task) in enumerate(self.config.tasks.items()):
            head = self.get_submodule(name)
            if task.kind == "classify":
                outputs.append(head(pooled))
                continue
            if grid is None:
                raise ValueError(
                    f"model.tasks.{name}.kind={task.kind} needs images, a row each, and rows are packed; "
                    "only classify takes packed rows"
                )
            if task.dense:
                outputs.append(head(features_BTC, earlier, grid))
                continue
            if text is None:
                raise ValueError(f"model.tasks.{name}.kind=contrast needs text, and the batch has none")
            outputs.append(head(pooled, text, _members(pooled, context, number, valid)))
        if self.log_variance is not None:
            # Not the parameter itself, which sharding takes away after the pass.
            outputs.append(self.log_variance.clone())
        return tuple(outputs)

    def _pooled(
        self,
        features_BTC: torch.Tensor,
        context: Context,
        grid: tuple[int, ...] | None,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        if grid is not None:
            return pool(features_BTC, self.config)
        assert context.images is not None and context.padding is not None and valid is not None, (
            "packed rows have images, padding and valid"
        )
        return pool_packed(features_BTC, context.images, context.padding, valid.shape[1])


def output_shapes(config: VisionConfig, batch: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of the outputs of `Heads` for a batch of these inputs; reads their sizes alone.

    Not a method, for its name could be a task's.
    """
    x = batch["x"]
    images = x.shape[:1]
    packed = batch.get("document_ids") is not None
    if packed:
        images = tuple(batch["sizes"].shape[:2])
    found: list[tuple[int, ...]] = []
    for task in config.tasks.values():
        classes = task.num_classes or 0
        map_ = () if packed else tuple(size // config.stride_of(task) for size in x.shape[2:])
        found.append(
            {
                "classify": (*images, classes),
                "segment": (*images, classes, *map_),
                "detect": (*images, torch.Size(map_).numel(), classes + BOX_FIGURES),
                "contrast": (*images, CONTRAST_FIGURES),
            }[task.kind]
        )
    return found + ([(len(config.tasks),)] if config.task_weighting == "uncertainty" else [])


def _members(
    pooled_BC: torch.Tensor, context: Context, number: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """Which samples are of this task and were read, bool (B,)."""
    members = torch.ones(pooled_BC.shape[0], dtype=torch.bool, device=pooled_BC.device)
    if valid is not None:
        members = members & valid
    return members if context.tasks is None else members & (context.tasks == number)
