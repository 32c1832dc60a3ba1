"""From an encoded image to numbers in [-1, 1]: decode, crop, resize, mirror, cut into patches.

Sizes are (height, width). Random choices are functions of the sample's key.

C channels, H, W height and width, p patch
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.config import AugmentConfig
from triptych.data_pipeline.images.draws import uniforms
from triptych.data_pipeline.images.index import FORMATS, MAX_PIXELS
from triptych.data_pipeline.images.randaugment import randaugment

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the image."""

CENTER = AugmentConfig()
"""What validation does to an image."""

_TRIES = 10


def decode(data: bytes, channels: int) -> Image:
    """The image, fully read, in 1 or 3 channels of 8 bits. Raises whatever Pillow makes of damaged data."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
        return image.convert("L" if channels == 1 else "RGB")


def pixels(
    image: Image, size: tuple[int, int], augment: AugmentConfig, sample_key: int, *, reshape: bool = False
) -> npt.NDArray[np.float32]:
    """(C, H, W) of the size wanted, in [-1, 1]; what of the image that is, `part` and `mirrored` say.

    reshape: whether augment.randaugment may turn and move what is seen. Raises ValueError for another size
    under crop: none.
    """
    if augment.crop == "none" and (image.height, image.width) != size:
        raise ValueError(
            f"its size is {[image.height, image.width]}, not {list(size)}, and augment.crop is none"
        )
    if augment.crop == "random_resized":
        cut = random_part(image, size, augment, sample_key)
    else:
        cut = center(image, size)
    if augment.randaugment is not None:
        cut = randaugment(cut, augment.randaugment, sample_key, reshape=reshape)
    values = np.asarray(cut, np.float32)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if mirrored(augment, sample_key):
        values = values[:, :, ::-1]
    return np.ascontiguousarray(values / np.float32(127.5) - np.float32(1.0))


def mirrored(augment: AugmentConfig, sample_key: int) -> bool:
    """Whether the sample is mirrored left to right, after it is cut."""
    return augment.flip and bool(uniforms(sample_key, "flip", 1)[0] < 0.5)


def part(image: tuple[int, int], size: tuple[int, int], augment: AugmentConfig, sample_key: int) -> Box:
    """The part of an image of (height, width) that `pixels` resizes to `size`, whatever the steps."""
    height, width = image
    if augment.crop == "random_resized":
        return random_box(image, size, augment, sample_key)
    if augment.crop == "none":
        return 0.0, 0.0, float(width), float(height)
    # Every step of `center` before its last scales the whole image, so together they are one scaling.
    covering = _covering(image, size)
    left, top = (covering[0] - size[1]) // 2, (covering[1] - size[0]) // 2
    x, y = width / covering[0], height / covering[1]
    return left * x, top * y, (left + size[1]) * x, (top + size[0]) * y


def center(image: Image, size: tuple[int, int]) -> Image:
    """Resized until it covers `size`, then cut to it evenly on both sides.

    As ADM does it: halved by averaging while it is at least twice too large, then bicubic.
    """
    from PIL.Image import Resampling

    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    covering = _covering((image.height, image.width), size)
    if image.size != covering:
        image = image.resize(covering, Resampling.BICUBIC)
    if covering == (width, height):
        return image
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _covering(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the image when, after its halvings, it just covers `size`."""
    height, width = image
    while width >= 2 * size[1] and height >= 2 * size[0]:
        height, width = height // 2, width // 2
    scale = max(size[1] / width, size[0] / height)
    return max(size[1], round(width * scale)), max(size[0], round(height * scale))


def random_part(image: Image, size: tuple[int, int], augment: AugmentConfig, sample_key: int) -> Image:
    """A random part of the image, resized to `size` (bicubic)."""
    from PIL.Image import Resampling

    box = random_box((image.height, image.width), size, augment, sample_key)
    return image.resize((size[1], size[0]), Resampling.BICUBIC, box=box)


def random_box(image: tuple[int, int], size: tuple[int, int], augment: AugmentConfig, sample_key: int) -> Box:
    """The part that is taken: area share uniform in `scale`, log aspect uniform about that of `size`.

    Ten tries to find one within the image, as in torchvision; then the largest part of the aspect wanted.
    """
    height, width = image
    draws = uniforms(sample_key, "crop", 4 * _TRIES).reshape(_TRIES, 4)
    low, high = np.log(augment.ratio)
    for share, stretch, x, y in draws:
        area = height * width * (augment.scale[0] + share * (augment.scale[1] - augment.scale[0]))
        aspect = size[1] / size[0] * math.exp(low + stretch * (high - low))
        part = (round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect)))
        if 0 < part[0] <= height and 0 < part[1] <= width:
            top, left = math.floor(y * (height - part[0] + 1)), math.floor(x * (width - part[1] + 1))
            return left, top, left + part[1], top + part[0]
    scale = min(height / size[0], width / size[1])
    part_height, part_width = size[0] * scale, size[1] * scale
    left, top = (width - part_width) / 2, (height - part_height) / 2
    return left, top, left + part_width, top + part_height


def patches(values: npt.NDArray[np.float32], patch: int) -> npt.NDArray[np.float32]:
    """(C, h*p, w*p) to (h*w, C*p*p): patches in raster order, the values of each channel by channel."""
    channels, height, width = values.shape
    grid = values.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.transpose(1, 3, 0, 2, 4).reshape(-1, channels * patch * patch)
