"""Boxes that a detection head found, and their mean average precision as COCO defines it.

COCO: area all, at most 100 boxes per image, no crowds; precision interpolated at 101 recalls (pycocotools'
COCOeval). Differs from it in that an image is known by its sample's key: of equal scores in several images
the smaller key comes first.

Shape legend: N cells of the map, K classes, D boxes found, R true boxes, H the ten thresholds of overlap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.training.objectives.vision.boxes import iou, nms
from triptych.training.objectives.vision.losses import split_boxes

Array = npt.NDArray[Any]

LEAST_SCORE = 0.05
"""Worse boxes are not looked at (FCOS, arXiv 1904.01355)."""
CANDIDATES = 1000
"""The best of an image, of which overlapping ones are then removed (likewise)."""
OVERLAP = 0.6
"""Intersection over union by which a better box of the same class removes another (likewise)."""
MOST_BOXES = 100
"""Kept per image."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Intersections over union at which a box counts as found."""
_RECALLS = np.linspace(0.0, 1.0, 101)


class Found(NamedTuple):
    """Boxes of one image, the best first. boxes: (D, 4), in pixels. scores: (D,). labels: int64 (D,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def find_boxes(output_NF: Tensor, points_N2: Tensor, stride: int) -> Found:
    """The boxes of one image from its output (N, K + 5) in float32 at least, cells at `points`, in pixels.

    A box's score is sqrt(probability of its class * centerness). Values that are not finite find nothing.
    """
    logits_NK, sides_N4, center_N = split_boxes(output_NF)
    scores_NK = (logits_NK.sigmoid() * center_N.sigmoid().unsqueeze(1)).sqrt()
    scores_NK = torch.where(torch.isfinite(sides_N4).all(dim=1, keepdim=True), scores_NK, 0.0)
    flat = torch.nan_to_num(scores_NK, nan=0.0).flatten()
    scores, order = flat.sort(descending=True, stable=True)
    order = order[:CANDIDATES][scores[:CANDIDATES] > LEAST_SCORE]
    cells, labels = order // logits_NK.shape[1], order % logits_NK.shape[1]
    points, sides = points_N2[cells].to(sides_N4.dtype), sides_N4[cells] * stride
    boxes = torch.cat([points - sides[:, :2], points + sides[:, 2:]], dim=1).clamp(min=0)
    edges = (points_N2.amax(dim=0) + stride / 2).to(boxes.dtype)
    boxes = torch.minimum(boxes, edges.repeat(2))
    kept = nms(boxes, labels, OVERLAP).nonzero().squeeze(1)[:MOST_BOXES]
    return Found(boxes[kept], flat[order[kept]], labels[kept])


def match(found: Found, boxes_R4: Tensor, labels_R: Tensor) -> Array:
    """Which of an image's boxes found are right, by threshold: bool (H, D).

    The best box first takes, of the true boxes of its class that are not taken yet, the one it overlaps most,
    if by the threshold at least; of equal ones the last, as in COCOeval.
    """
    right = np.zeros((len(THRESHOLDS), len(found.labels)), dtype=bool)
    if not len(labels_R):
        return right
    overlaps_DR = iou(found.boxes.double(), boxes_R4.double()).cpu().numpy()
    same_DR = (found.labels[:, None] == labels_R[None]).cpu().numpy()
    free_HR = np.ones((len(THRESHOLDS), len(labels_R)), dtype=bool)
    least_H1 = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    for number, (overlap_R, same_R) in enumerate(zip(overlaps_DR, same_DR, strict=True)):
        allowed_HR = free_HR & same_R & (overlap_R >= least_H1)
        value_HR = np.where(allowed_HR, overlap_R, -1.0)
        best_H = len(labels_R) - 1 - value_HR[:, ::-1].argmax(axis=1)
        right[:, number] = allowed_HR.any(axis=1)
        free_HR[np.flatnonzero(right[:, number]), best_H[right[:, number]]] = False
    return right


class Records:
    """What all images' boxes come to: per box found its key, place, score, label and matches; true boxes per
    class. Adding images in another order gives the same figures."""

    def __init__(self, num_classes: int) -> None:
        self.true_boxes = np.zeros(num_classes, dtype=np.int64)
        self._rows: list[tuple[Array, ...]] = []

    def add(self, key: int, found: Found, boxes_R4: Tensor, labels_R: Tensor) -> None:
        """One image's. boxes, labels: the true ones."""
        self.true_boxes += np.bincount(labels_R.cpu().numpy(), minlength=len(self.true_boxes))
        size = len(found.labels)
        keys = np.full(size, key, dtype=np.int64)
        scores, labels = found.scores.double().cpu().numpy(), found.labels.cpu().numpy()
        self._rows.append((keys, np.arange(size), scores, labels, match(found, boxes_R4, labels_R).T))

    def state(self) -> dict[str, Any]:
        """Arrays, to be sent to where they are merged."""
        names = ("keys", "places", "scores", "labels", "right")
        columns = zip(*self._rows, strict=True) if self._rows else ((),) * len(names)
        arrays = [np.concatenate(column) if column else None for column in columns]
        return {"true_boxes": self.true_boxes, **dict(zip(names, arrays, strict=True))}


def average_precisions(states: list[dict[str, Any]]) -> Array | None:
    """(H, classes that have a true box) of all images; None where there is no true box."""
    true_boxes = np.sum([state["true_boxes"] for state in states], axis=0)
    if not true_boxes.any():
        return None
    filled = [state for state in states if state["keys"] is not None]
    if not filled:
        return np.zeros((len(THRESHOLDS), int((true_boxes > 0).sum())))
    keys, places, scores, labels, right = (
        np.concatenate([state[name] for state in filled])
        for name in ("keys", "places", "scores", "labels", "right")
    )
    order = np.lexsort((places, keys, -scores))
    labels, right = labels[order], right[order]
    classes = np.flatnonzero(true_boxes)
    return np.stack(
        [
            [average_precision(right[labels == one][:, level], int(true_boxes[one])) for one in classes]
            for level in range(len(THRESHOLDS))
        ]
    )


def average_precision(right_D: Array, true_boxes: int) -> float:
    """The mean over 101 recalls of the best precision at that recall or a higher one.

    right: bool (D,), of all images, the highest score first. true_boxes: at least 1.
    """
    hits = np.cumsum(right_D)
    precision = hits / np.arange(1, len(right_D) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Behind the last box precision is 0.
    places = np.searchsorted(hits / true_boxes, _RECALLS, side="left")
    return float(np.append(envelope, 0.0)[places].mean())
