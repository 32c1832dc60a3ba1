"""RandAugment (arXiv 1909.13719) by Pillow alone: a few operations drawn evenly, all of one strength.

The operations and their ranges are AutoAugment's (arXiv 1805.09501), without its inversion and cutout: those
on colours, and those that turn, shear or move the image, which only a label for the whole image survives.
What comes in from outside the image is black. Each draw is a function of the sample's key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from triptych.data_pipeline.images.config import RandAugmentConfig
from triptych.data_pipeline.images.draws import uniforms

if TYPE_CHECKING:
    from PIL.Image import Image

Operation = Callable[["Image", float, int], "Image"]
"""From an image, the strength from 0 to 1 and a sign to another image of the same size and mode."""


def randaugment(image: Image, config: RandAugmentConfig, sample_key: int, *, reshape: bool) -> Image:
    """The image after config.num_ops operations. reshape: whether turning, shearing and moving are among
    them."""
    operations = [*_COLOURS, *_SHAPES] if reshape else _COLOURS
    draws = uniforms(sample_key, "randaugment", 2 * config.num_ops).reshape(-1, 2)
    for which, side in draws:
        operation = operations[int(which * len(operations))]
        image = operation(image, config.magnitude / 10, 1 if side < 0.5 else -1)
    return image


def _identity(image: Image, strength: float, sign: int) -> Image:
    return image


def _autocontrast(image: Image, strength: float, sign: int) -> Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: Image, strength: float, sign: int) -> Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _solarize(image: Image, strength: float, sign: int) -> Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, round(256 * (1 - strength)))


def _posterize(image: Image, strength: float, sign: int) -> Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, round(8 - 4 * strength))


def _enhance(name: str) -> Operation:
    """Pillow's enhancement of that name, by a factor of up to 0.9 away from 1."""

    def operation(image: Image, strength: float, sign: int) -> Image:
        from PIL import ImageEnhance

        kind = getattr(ImageEnhance, name)
        enhanced: Image = kind(image).enhance(1 + sign * 0.9 * strength)
        return enhanced

    return operation


def _rotate(image: Image, strength: float, sign: int) -> Image:
    from PIL.Image import Resampling

    return image.rotate(sign * 30 * strength, Resampling.BILINEAR)


def _affine(column: int, most: float, *, of_edge: bool = False) -> Operation:
    """An affine map whose entry `column` (a b c d e f: x' = a x + b y + c) is up to `most`, or so much of the
    edge."""

    def operation(image: Image, strength: float, sign: int) -> Image:
        from PIL.Image import Resampling, Transform

        edge = (image.width if column == 2 else image.height) if of_edge else 1
        matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        matrix[column] = sign * most * strength * edge
        return image.transform(image.size, Transform.AFFINE, matrix, Resampling.BILINEAR)

    return operation


_COLOURS: list[Operation] = [
    _identity,
    _autocontrast,
    _equalize,
    _solarize,
    _posterize,
    _enhance("Color"),
    _enhance("Contrast"),
    _enhance("Brightness"),
    _enhance("Sharpness"),
]
_SHAPES: list[Operation] = [
    _rotate,
    _affine(1, 0.3),
    _affine(3, 0.3),
    _affine(2, 150 / 331, of_edge=True),
    _affine(5, 150 / 331, of_edge=True),
]
