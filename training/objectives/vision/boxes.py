"""Mathematics of boxes: (x0, y0, x1, y1) in pixels, or sides (left, top, right, bottom) from a cell's centre.

Shape legend: B images, M boxes of an image, N cells of the map, in raster order, S boxes in all.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CENTER_RADIUS = 1.5
"""Cells within so many strides of a box's centre, along each axis, are trained to find it (FCOS, arXiv
1904.01355, with the later centre sampling)."""
FOCAL_ALPHA = 0.25
"""Weight of the foreground in the focal loss (arXiv 1708.02002)."""
FOCAL_GAMMA = 2.0
"""How much easy cells are discounted (likewise)."""


def centers(grid: tuple[int, int], stride: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, 2): x and y of the cells' centres, in pixels."""
    rows, columns = grid
    x = (torch.arange(columns, device=device, dtype=dtype) + 0.5) * stride
    y = (torch.arange(rows, device=device, dtype=dtype) + 0.5) * stride
    return torch.stack([x.expand(rows, -1), y.unsqueeze(1).expand(-1, columns)], dim=2).flatten(0, 1)


def crop(boxes: Tensor, labels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The boxes' parts within the image, (..., 4), and the labels, -1 where no area is left.

    Boxes of no area or with values that are not finite are all zeros then.
    """
    limits = boxes.new_tensor([width, height, width, height])
    inside = torch.minimum(boxes.clamp(min=0), limits)
    sound = torch.isfinite(boxes).all(dim=-1) & (labels >= 0)
    sound = sound & ((inside[..., 2:] - inside[..., :2]) > 0).all(dim=-1)
    return torch.where(sound.unsqueeze(-1), inside, 0.0), torch.where(sound, labels, -1)


def areas(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...,)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Intersection over union of every pair: (S, 4), (R, 4) -> (S, R); 0 for two boxes of no area."""
    low = torch.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = torch.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=2)
    either = areas(ours)[:, None] + areas(theirs)[None] - both
    return torch.where(either > 0, both / either.clamp(min=torch.finfo(ours.dtype).tiny), 0.0)


def assign(boxes_BM4: Tensor, labels_BM: Tensor, grid: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Which box each cell is trained to find (FCOS, section 3.1).

    boxes: cropped, in pixels. labels: -1 for no box. A cell belongs to the boxes that it is inside of and
    near the centre of (CENTER_RADIUS); of several to the smallest, and of equally small ones to the first.
    Returns the labels of the cells, int64 (B, N), -1 for none, and the sides of their boxes (B, N, 4), in
    strides; 1 where there is none.
    """
    points_N2 = centers(grid, stride, boxes_BM4.device, boxes_BM4.dtype)
    if labels_BM.shape[1] == 0:
        empty = labels_BM.new_full((labels_BM.shape[0], points_N2.shape[0]), -1)
        return empty, boxes_BM4.new_ones(*empty.shape, 4)
    points_1N12 = points_N2[None, :, None]
    low_B1M2, high_B1M2 = boxes_BM4[:, None, :, :2], boxes_BM4[:, None, :, 2:]
    sides_BNM4 = torch.cat([points_1N12 - low_B1M2, high_B1M2 - points_1N12], dim=3)
    distance_BNM2 = (points_1N12 - (low_B1M2 + high_B1M2) / 2).abs()
    found_BNM = (sides_BNM4 > 0).all(dim=3) & (distance_BNM2 < CENTER_RADIUS * stride).all(dim=3)
    found_BNM = found_BNM & (labels_BM >= 0).unsqueeze(1)
    size_BNM = torch.where(found_BNM, areas(boxes_BM4).unsqueeze(1), torch.inf)
    which_BN1 = size_BNM.argmin(dim=2, keepdim=True)
    any_BN = found_BNM.any(dim=2)
    labels_BN = torch.where(any_BN, labels_BM.gather(1, which_BN1.squeeze(2)), -1)
    sides_BN4 = sides_BNM4.gather(2, which_BN1.unsqueeze(3).expand(-1, -1, -1, 4)).squeeze(2) / stride
    return labels_BN, torch.where(any_BN.unsqueeze(2), sides_BN4, 1.0)


def centerness(sides: Tensor) -> Tensor:
    """Of cells by their sides (..., 4) > 0: 1 at the centre of the box, 0 at its edge (FCOS, equation 3)."""
    left, top, right, bottom = sides.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


def giou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - GIoU of boxes by their sides from the same cell (arXiv 1902.09630): (..., 4) -> (...,), 0 to 2.

    wanted: of boxes with an area. predicted: at least 0.
    """
    smaller, larger = torch.minimum(predicted, wanted), torch.maximum(predicted, wanted)
    both, hull = _size(smaller), _size(larger)
    either = _size(predicted) + _size(wanted) - both
    return 1 - (both / either - (hull - either) / hull)


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t (arXiv 1708.02002), elementwise; targets are 0 or 1."""
    surprise = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    wrong = p + targets - 2 * p * targets
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return alpha * wrong.pow(FOCAL_GAMMA) * surprise


def nms(boxes_S4: Tensor, labels_S: Tensor, threshold: float) -> Tensor:
    """Boxes that are left when each one removes those of its class behind it that overlap it by more.

    boxes: the best first. Returns bool (S,).
    """
    rivals = (iou(boxes_S4, boxes_S4) > threshold) & (labels_S[:, None] == labels_S[None])
    worse = rivals.triu(1).cpu().numpy()
    kept = np.ones(len(labels_S), dtype=bool)
    for number in range(len(kept)):
        if kept[number]:
            kept &= ~worse[number]
    return torch.from_numpy(kept).to(labels_S.device)


def _size(sides: Tensor) -> Tensor:
    return (sides[..., 0] + sides[..., 2]) * (sides[..., 1] + sides[..., 3])
