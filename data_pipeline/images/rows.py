"""One sample from its members' bytes, and the rows of a batch from samples.

C channels, H, W height and width, T tokens of a row, G images in a row, p patch, L, E tokens and channels of
a text
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images import augment
from triptych.data_pipeline.images.config import AugmentConfig, ImageDataConfig
from triptych.data_pipeline.images.draws import normals
from triptych.data_pipeline.images.index import IMAGE_SUFFIXES, MEAN, STD, TEXT
from triptych.data_pipeline.images.needs import ImageNeeds
from triptych.data_pipeline.images.scaling import LatentScale

Row = dict[str, Any]
"""A row of a batch, as numpy arrays and numbers."""


class Unreadable(ValueError):
    """A sample whose bytes cannot be made into what they should be."""


@dataclass(frozen=True)
class Decoder:
    """From the members of a sample to its arrays."""

    config: ImageDataConfig
    needs: ImageNeeds
    augment: AugmentConfig
    scale: LatentScale | None
    """For latents."""

    def values(
        self, members: Mapping[str, bytes], size: tuple[int, int], sample_key: int
    ) -> npt.NDArray[np.float32]:
        """(C, H, W) of the size wanted. Raises Unreadable."""
        try:
            if self.scale is not None:
                return self._latent(members, (self.config.channels, *size), sample_key)
            data = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if data is None:
                raise ValueError(f"it has no image ({', '.join(IMAGE_SUFFIXES)})")
            return augment.pixels(augment.decode(data, self.config.channels), size, self.augment, sample_key)
        except Exception as error:  # Pillow's and numpy's readers meet damaged data with errors of any kind
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    def _latent(
        self, members: Mapping[str, bytes], shape: tuple[int, ...], sample_key: int
    ) -> npt.NDArray[np.float32]:
        assert self.scale is not None, "latents have a scale"
        mean, std = load_array(members[MEAN]), load_array(members[STD])
        if mean.shape != shape or std.shape != shape:
            raise ValueError(f"mean {mean.shape} and std {std.shape} are not both {shape}")
        drawn = mean.astype(np.float64) + std.astype(np.float64) * normals(sample_key, "latent", shape)
        drawn = (drawn - self.scale.shift) * self.scale.factor
        if not np.isfinite(drawn).all():
            raise ValueError("it holds values that are not finite")
        return drawn.astype(np.float32)

    def grid_row(
        self, members: Mapping[str, bytes], label: int, size: tuple[int, int], sample_key: int, name: str = ""
    ) -> Row:
        """The row of one image, called `name` in messages. Raises Unreadable."""
        row: Row = {"x": self.values(members, size, sample_key)}
        if self.needs.num_classes is not None:
            row["labels"] = label
        if self.needs.text is not None:
            row["text"] = read_text(members, self.needs.text)
        return {**row, "valid": True, "sample_keys": sample_key}

    def empty_row(self, size: tuple[int, int], sample_key: int) -> Row:
        """A row in place of an image that there is not: zeros, label 0, valid False."""
        row: Row = {"x": np.zeros((self.config.channels, *size), np.float32)}
        if self.needs.num_classes is not None:
            row["labels"] = 0
        if self.needs.text is not None:
            row["text"] = np.zeros(self.needs.text, np.float32)
        return {**row, "valid": False, "sample_keys": sample_key}

    def packed_row(self, sample_key: int) -> Row:
        """A row without images yet, for `put`. Padding has document id G and position 0, 0."""
        packing = self.config.packing
        assert packing is not None, "a packed row without packing"
        tokens, images = packing.max_tokens, packing.max_images
        row: Row = {
            "x": np.zeros((tokens, packing.patch_size**2 * self.config.channels), np.float32),
            "positions": np.zeros((tokens, 2), np.int64),
            "document_ids": np.full(tokens, images, np.int64),
            "sizes": np.zeros((images, 2), np.int64),
        }
        if self.needs.num_classes is not None:
            row["labels"] = np.zeros(images, np.int64)
        valid, image_keys = np.zeros(images, np.bool_), np.zeros(images, np.int64)
        return {**row, "valid": valid, "image_keys": image_keys, "sample_keys": sample_key}


def read_text(members: Mapping[str, bytes], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """(L, E), zeros behind the text's end. Raises Unreadable."""
    filled = np.zeros(shape, np.float32)
    try:
        found = load_array(members[TEXT])
        if found.ndim != 2 or len(found) > len(filled) or found.shape[1] != filled.shape[1]:
            raise ValueError(f"{TEXT} has shape {found.shape}, and {filled.shape} is the most there can be")
        filled[: len(found)] = found
        if not np.isfinite(filled).all():
            raise ValueError(f"{TEXT} holds values that are not finite")
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    return filled


def load_array(data: bytes) -> npt.NDArray[Any]:
    """An .npy file's array; never unpickles. Raises ValueError."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def put(
    row: Row,
    place: int,
    start: int,
    grid: tuple[int, int],
    tokens: npt.NDArray[np.float32] | None,
    label: int,
    image_key: int,
) -> int:
    """Puts an image of (h, w) tokens into a packed row, from token `start` on; where the next one starts.

    tokens: (h * w, p*p*C), or None for one that could not be read, whose place stays, with valid False.
    """
    stop = start + grid[0] * grid[1]
    row["positions"][start:stop] = np.indices(grid).reshape(2, -1).T
    row["document_ids"][start:stop] = place
    row["sizes"][place] = grid
    row["image_keys"][place] = image_key
    if tokens is not None:
        row["x"][start:stop] = tokens
        row["valid"][place] = True
        if "labels" in row:
            row["labels"][place] = label
    return stop
