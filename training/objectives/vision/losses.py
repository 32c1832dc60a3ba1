"""The loss of each kind of task: sums over the samples that are the task's, and how many terms they have.

All are in float32 at least. A sample that is not the task's is left out before anything is computed of it, so
it has a gradient of exactly zero.

Shape legend: B samples, S samples of the task, K classes, H and W pixels, N cells of the map.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.models.context import has_values
from triptych.models.vision_config import TaskConfig
from triptych.training.objectives.config import VisionTaskConfig
from triptych.training.objectives.vision.boxes import centerness, focal_loss, giou_loss

Targets = dict[str, Any]


class TaskLoss(Protocol):
    """What one kind of task is trained for."""

    def __init__(self, task: TaskConfig, config: VisionTaskConfig) -> None: ...

    def count(self, targets: Targets, members: Tensor) -> Tensor:
        """Terms of the loss, int64 scalar. members: bool (B,), or (B, G) in packed rows: whose task it is."""

    def sum(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        """Sum of those terms, a scalar. output: of the task's head (models/heads)."""


class ClassifyLoss:
    """Cross-entropy, of all classes together or of each by itself, with smoothed and mixed labels; terms are
    images with a label."""

    def __init__(self, task: TaskConfig, config: VisionTaskConfig) -> None:
        self.config = config

    def count(self, targets: Targets, members: Tensor) -> Tensor:
        return (members & (targets["labels"] >= 0)).sum()

    def sum(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        rows = chosen(members & (targets["labels"] >= 0))
        logits_SK = widened(output).flatten(0, -2)[rows]
        wanted_SK = self.distribution(targets, rows, logits_SK)
        if self.config.loss == "bce":
            return F.binary_cross_entropy_with_logits(logits_SK, wanted_SK, reduction="sum")
        return -(wanted_SK * logits_SK.log_softmax(dim=1)).sum()

    def distribution(self, targets: Targets, rows: Tensor, logits_SK: Tensor) -> Tensor:
        """The smoothed mixture of labels, (S, K)."""
        labels_S = targets["labels"].flatten()[rows]
        classes = torch.arange(logits_SK.shape[1], device=rows.device)
        wanted_SK = (labels_S.unsqueeze(1) == classes).to(logits_SK.dtype)
        if "labels_other" in targets:
            other_S = targets["labels_other"].flatten()[rows]
            other_S = torch.where(other_S < 0, labels_S, other_S)
            share_S1 = targets["share"].flatten()[rows].to(logits_SK.dtype).unsqueeze(1)
            wanted_SK = share_S1 * wanted_SK + (1 - share_S1) * (other_S.unsqueeze(1) == classes)
        smoothing = self.config.label_smoothing
        return (1 - smoothing) * wanted_SK + smoothing / logits_SK.shape[1]


class SegmentLoss:
    """Cross-entropy of every labelled pixel, plus dice (1 - Dice of an image), as often as its labelled
    pixels."""

    def __init__(self, task: TaskConfig, config: VisionTaskConfig) -> None:
        self.dice = config.dice

    def count(self, targets: Targets, members: Tensor) -> Tensor:
        return ((targets["masks"] >= 0) & members[:, None, None]).sum()

    def sum(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        rows = chosen(members)
        masks_SHW = targets["masks"][rows]
        labelled_SHW = masks_SHW >= 0
        logs_SKHW = upsampled(output[rows], masks_SHW.shape[1:]).log_softmax(dim=1)
        hit_SHW = logs_SKHW.gather(1, masks_SHW.clamp(min=0).unsqueeze(1)).squeeze(1)
        total = -torch.where(labelled_SHW, hit_SHW, 0.0).sum()
        if self.dice:
            pixels_S = labelled_SHW.sum(dim=(1, 2))
            total = total + self.dice * (pixels_S * dice_loss(logs_SKHW.exp(), masks_SHW)).sum()
        return total


class DetectLoss:
    """Focal loss of the classes of every cell, GIoU and centerness of the cells that have a box (FCOS, arXiv
    1904.01355, with the later GIoU); terms are the cells that have a box."""

    def __init__(self, task: TaskConfig, config: VisionTaskConfig) -> None:
        assert task.num_classes is not None, "the configuration asks for it"
        self.num_classes = task.num_classes

    def count(self, targets: Targets, members: Tensor) -> Tensor:
        return ((targets["cell_labels"] >= 0) & members.unsqueeze(1)).sum()

    def sum(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        rows = chosen(members)
        wide_SNF = widened(output[rows])
        labels_SN = targets["cell_labels"][rows]
        sides_SN4 = targets["cell_sides"][rows].to(wide_SNF.dtype)
        logits_SNK, predicted_SN4, center_SN = split_boxes(wide_SNF)
        classes = torch.arange(self.num_classes, device=rows.device)
        wanted_SNK = (labels_SN.unsqueeze(2) == classes).to(wide_SNF.dtype)
        center = F.binary_cross_entropy_with_logits(center_SN, centerness(sides_SN4), reduction="none")
        of_boxes_SN = giou_loss(predicted_SN4, sides_SN4) + center
        return focal_loss(logits_SNK, wanted_SNK).sum() + torch.where(labels_SN >= 0, of_boxes_SN, 0.0).sum()


class ContrastLoss:
    """The head's own losses; terms are images with a text."""

    def __init__(self, task: TaskConfig, config: VisionTaskConfig) -> None:
        pass

    def count(self, targets: Targets, members: Tensor) -> Tensor:
        return members.sum()

    def sum(self, output: Tensor, targets: Targets, members: Tensor) -> Tensor:
        return widened(output)[chosen(members), 0].sum()


LOSSES: dict[str, type[TaskLoss]] = {
    "classify": ClassifyLoss,
    "segment": SegmentLoss,
    "detect": DetectLoss,
    "contrast": ContrastLoss,
}


def chosen(members: Tensor) -> Tensor:
    """Numbers of the True places in a flattened mask; all numbers where it has no values."""
    flat = members.flatten()
    if not has_values(flat):
        return torch.arange(flat.shape[0], device=flat.device)
    return flat.nonzero().squeeze(1)


def widened(output: Tensor) -> Tensor:
    """In fp32; fp64 stays fp64."""
    return output if output.dtype == torch.float64 else output.float()


def upsampled(logits_SKhw: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, to the size of the masks: (S, K, h, w) -> (S, K, H, W), in float32 at least."""
    if logits_SKhw.shape[2:] == size:
        return widened(logits_SKhw)
    return F.interpolate(widened(logits_SKhw), size=tuple(size), mode="bilinear", align_corners=False)


def split_boxes(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a detection head (..., K + 5) -> class logits (..., K), sides (..., 4), centerness
    (...,)."""
    logits, sides, center = output.split([output.shape[-1] - 5, 4, 1], dim=-1)
    return logits, sides, center.squeeze(-1)


def dice_loss(shares_SKHW: Tensor, masks_SHW: Tensor) -> Tensor:
    """1 - Dice, the mean over the classes that an image has, (S,); 0 where no pixel is labelled.

    shares: probabilities. Unlabelled pixels (-1) count neither as predicted nor as there.
    """
    classes = torch.arange(shares_SKHW.shape[1], device=masks_SHW.device).view(1, -1, 1, 1)
    there_SKHW = (masks_SHW.unsqueeze(1) == classes).to(shares_SKHW.dtype)
    labelled_S1HW = (masks_SHW >= 0).unsqueeze(1).to(shares_SKHW.dtype)
    both_SK = (shares_SKHW * there_SKHW).sum(dim=(2, 3))
    pixels_SK = there_SKHW.sum(dim=(2, 3))
    sum_SK = (shares_SKHW * labelled_S1HW).sum(dim=(2, 3)) + pixels_SK
    present_SK = pixels_SK > 0
    losses_SK = torch.where(present_SK, 1 - 2 * both_SK / torch.where(present_SK, sum_SK, 1.0), 0.0)
    return losses_SK.sum(dim=1) / present_SK.sum(dim=1).clamp(min=1)
