"""From a model's images to pictures: bytes, a grid of them, a PNG file.

Shape legend: N images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Pictures = npt.NDArray[np.uint8]

GAP = 2
"""Pixels around each picture of a grid."""
# Neither black nor white: the edge of a picture is seen on both.
_BACKGROUND = 128
# Smaller pictures, such as digits of 8 by 8, are enlarged for the eye.
_SMALLEST_SIDE = 32


def to_uint8(images: Tensor) -> Pictures:
    """Images (N, C, H, W) with values in [-1, 1] -> bytes (N, H, W, C), rounded; others are clamped.

    Raises RuntimeError for values that are not finite: they would become some colour.
    """
    if not bool(torch.isfinite(images).all()):
        bad = (~torch.isfinite(images)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise RuntimeError(
            f"{len(bad)} of {len(images)} images are not finite (the first is number {bad[0]} of its batch): "
            "the model or its sampler diverged; take more steps, a lower guidance scale or another checkpoint"
        )
    bytes_ = images.detach().clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return bytes_.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def latents_to_uint8(latents: Tensor) -> Pictures:
    """Latents (N, C, H, W) of any C -> bytes (N, H, W, 3 or 1) to look at where no decoder is at hand.

    The first three channels (one, where C is below 3) as red, green and blue, each picture stretched
    by itself to its largest magnitude. Shapes can be recognised, colours mean nothing.
    """
    shown = latents[:, : 3 if latents.shape[1] >= 3 else 1]
    largest = shown.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(shown.dtype).tiny)
    return to_uint8(shown / largest)


def grid(pictures: Pictures, columns: int) -> Pictures:
    """Pictures (N, H, W, C) in rows of `columns`, read like text -> one picture (H', W', C).

    Sides below 32 pixels are enlarged by a whole factor, nearest neighbour.
    """
    count, height, width, channels = pictures.shape
    factor = max(1, _SMALLEST_SIDE // max(height, width))
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels)
    whole = np.full(shape, _BACKGROUND, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top, left = (GAP + (place // columns) * (height + GAP), GAP + (place % columns) * (width + GAP))
        whole[top : top + height, left : left + width] = picture
    return whole


def write_png(path: Path, picture: Pictures, notes: Sequence[tuple[str, str]] = ()) -> None:
    """Write a picture (H, W, C) with C 1 or 3 as PNG, so that the file is absent or whole.

    notes: (key, text) pairs for the file's text chunks. Raises OSError as the file system does.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in notes:
        info.add_text(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(
            temporary, format="PNG", pnginfo=info
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
