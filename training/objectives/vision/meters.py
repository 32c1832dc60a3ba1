"""How good a vision model is on a validation set, task by task.

A meter adds up over batches; meters of several ranks are merged by their states. The order of the samples,
and how they are dealt to ranks, make no difference.

Shape legend: B samples, S samples of the task, K classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.models.vision_config import TaskConfig, VisionConfig
from triptych.training.objectives.vision.losses import Targets, chosen, upsampled, widened
from triptych.training.objectives.vision.precision import Records, average_precisions, find_boxes

State = dict[str, Any]


class VisionMeter:
    """All tasks' meters; metrics are named "<task>/<figure>", and a task without samples has none.

    classify: top1, and top5 where there are more than five classes. segment: miou, the mean over the classes
    that are there or predicted, and pixel_accuracy. detect: map50, and map, the mean over overlaps of 0.5 to
    0.95. contrast: top1, the share of images that are nearest to their own text.
    Losses are among the objective's own metrics.
    """

    def __init__(self, model: VisionConfig) -> None:
        self.meters = {
            name: METERS[task.kind](task, model.dense_stride) for name, task in model.tasks.items()
        }

    @torch.no_grad()
    def update(self, outputs: Sequence[Tensor], targets: Targets) -> None:
        """Adds a batch, as VisionObjective.loss is called with it."""
        for number, (meter, output) in enumerate(zip(self.meters.values(), outputs)):
            valid = targets["valid"]
            mine = (targets["tasks"] == number).view(-1, *(1,) * (valid.ndim - 1))
            meter.update(output, targets, valid & mine)

    def state(self) -> dict[str, State]:
        """What has been added, as plain numbers and NumPy arrays by task."""
        return {name: meter.state() for name, meter in self.meters.items()}

    def merge(self, states: Sequence[dict[str, State]]) -> dict[str, float]:
        """The metrics of everything that these meters have seen together."""
        figures: dict[str, float] = {}
        for name, meter in self.meters.items():
            mine = [state[name] for state in states]
            sums = np.sum([state["sums"] for state in mine], axis=0)
            if sums[0] > 0:
                figures |= {f"{name}/{key}": value for key, value in meter.figures(sums[1:], mine).items()}
        return figures


class TaskMeter:
    """What the meters of all kinds have in common: a vector of sums, of samples and of what is the kind's."""

    def __init__(self, task: TaskConfig, stride: int) -> None:
        self.num_classes = task.num_classes or 0
        self.stride = stride
        self.sums = np.zeros(1 + self.size(), dtype=np.float64)

    def size(self) -> int:
        """How many sums the kind has."""
        raise NotImplementedError

    def update(self, output: Tensor, targets: Targets, members: Tensor) -> None:
        """Adds the samples that `members` says."""
        if not bool(members.any()):
            return
        self.sums[0] += float(members.sum())
        self.sums[1:] += self.measure(output, targets, members).double().cpu().numpy()

    def state(self) -> State:
        return {"sums": self.sums}

    def measure(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        """Sums of the kind, (size,)."""
        raise NotImplementedError

    def figures(self, sums: Any, states: list[State]) -> dict[str, float]:
        """Metrics by name from the sums of the kind, and the states that they are of."""
        raise NotImplementedError


class ClassifyMeter(TaskMeter):
    """Sums: images with a label, and whose label is the first, or among the first five."""

    def size(self) -> int:
        return 3

    def measure(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        rows = chosen(members & (targets["labels"] >= 0))
        logits_SK, labels_S = widened(output).flatten(0, -2)[rows], targets["labels"].flatten()[rows]
        place_S = place_of(logits_SK, labels_S)
        return torch.stack([place_S.new_tensor(len(place_S)), (place_S < 1).sum(), (place_S < 5).sum()])

    def figures(self, sums: Any, states: list[State]) -> dict[str, float]:
        labelled = max(sums[0], 1)
        found = {"top1": float(sums[1] / labelled)}
        return found | ({"top5": float(sums[2] / labelled)} if self.num_classes > 5 else {})


class SegmentMeter(TaskMeter):
    """Sums: of each class the pixels where prediction and mask agree, those predicted, those in masks."""

    def size(self) -> int:
        return 3 * self.num_classes

    def measure(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        rows = chosen(members)
        masks_SHW = targets["masks"][rows]
        predicted_SHW = upsampled(output[rows], masks_SHW.shape[1:]).argmax(dim=1)
        labelled = masks_SHW >= 0
        wanted, predicted = masks_SHW[labelled], predicted_SHW[labelled]
        counted = (wanted[wanted == predicted], predicted, wanted)
        return torch.cat([torch.bincount(pixels, minlength=self.num_classes) for pixels in counted])

    def figures(self, sums: Any, states: list[State]) -> dict[str, float]:
        agreed, predicted, wanted = sums.reshape(3, -1)
        union = predicted + wanted - agreed
        if not union.any():
            return {}
        miou = (agreed[union > 0] / union[union > 0]).mean()
        return {"miou": float(miou), "pixel_accuracy": float(agreed.sum() / wanted.sum())}


class DetectMeter(TaskMeter):
    """Boxes found in every image, and which of them are right."""

    def __init__(self, task: TaskConfig, stride: int) -> None:
        super().__init__(task, stride)
        self.records = Records(self.num_classes)

    def size(self) -> int:
        return 0

    def measure(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        for row in chosen(members).tolist():
            found = find_boxes(widened(output[row]), targets["points"], self.stride)
            labels_M = targets["box_labels"][row]
            true = labels_M >= 0
            key = int(targets["sample_keys"][row])
            self.records.add(key, found, targets["boxes"][row][true], labels_M[true])
        return torch.zeros(0)

    def state(self) -> State:
        return {**super().state(), **self.records.state()}

    def figures(self, sums: Any, states: list[State]) -> dict[str, float]:
        values_HK = average_precisions(states)
        if values_HK is None:
            return {}
        return {"map50": float(values_HK[0].mean()), "map": float(values_HK.mean())}


class ContrastMeter(TaskMeter):
    """Sums: images, and those nearest to their own text."""

    def size(self) -> int:
        return 2

    def measure(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        hits_S = widened(output)[chosen(members), 1]
        return torch.stack([hits_S.new_tensor(len(hits_S)), hits_S.sum()])

    def figures(self, sums: Any, states: list[State]) -> dict[str, float]:
        return {"top1": float(sums[1] / max(sums[0], 1))}


METERS: dict[str, type[TaskMeter]] = {
    "classify": ClassifyMeter,
    "segment": SegmentMeter,
    "detect": DetectMeter,
    "contrast": ContrastMeter,
}


def place_of(logits_SK: Tensor, labels_S: Tensor) -> Tensor:
    """How many classes stand before each sample's own, int64 (S,); of equal logits the first class is before.

    Logits that are not numbers put the own class last.
    """
    own_S1 = logits_SK.gather(1, labels_S.unsqueeze(1))
    earlier_SK = torch.arange(logits_SK.shape[1], device=labels_S.device) < labels_S.unsqueeze(1)
    before_SK = (logits_SK > own_S1) | ((logits_SK == own_S1) & earlier_SK)
    unknown_S = torch.isnan(logits_SK).any(dim=1)
    return torch.where(unknown_S, logits_SK.shape[1], before_SK.sum(dim=1))
