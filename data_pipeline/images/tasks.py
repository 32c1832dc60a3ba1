"""Rows of a vision model's batch: each has the labels of its source's task, and places for those of the
others.

So all rows are alike in names and shapes, whichever tasks a batch happens to have. Which names there are
follows from the kinds of the model's tasks.

    always     x, valid, tasks (the task's number), sample_keys
    classify   labels, labels_other (-1: none), share (of `labels`; the rest is of `labels_other`)
    segment    masks (H, W), -1: ignored, or none
    detect     boxes (M, 4), x0, y0, x1, y1 in pixels of x; box_labels (M,), -1: no box
    contrast   text (L, E), zeros behind its end
    packed     x, positions, document_ids, sizes, labels, valid, image_keys, as rows.py has them; tasks

M data.max_boxes, H, W height and width, L, E tokens and channels of a text
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from triptych.data_pipeline.images import augment, targets
from triptych.data_pipeline.images.config import AugmentConfig, ImageDataConfig, ImageSourceConfig
from triptych.data_pipeline.images.faults import CutImages
from triptych.data_pipeline.images.index import BOXES, IMAGE_SUFFIXES, MASK
from triptych.data_pipeline.images.mixing import mix
from triptych.data_pipeline.images.needs import ImageNeeds, TaskNeeds
from triptych.data_pipeline.images.rows import Decoder, Row, Unreadable, read_text
from triptych.data_pipeline.images.scaling import LatentScale

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TaskDecoder(Decoder):
    """From the members of a sample to the row of its source's task."""

    task: TaskNeeds
    cut: CutImages
    """Images that have more boxes than a row."""

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed with others of the source."""
        return self.augment.mixes and self.task.kind == "classify"

    def grid_row(
        self, members: Mapping[str, bytes], label: int, size: tuple[int, int], sample_key: int, name: str = ""
    ) -> Row:
        """The row of one image, unmixed. Raises Unreadable."""
        row = self.empty_row(size, sample_key)
        try:
            image = self._image(members)
            row["x"] = augment.pixels(
                image, size, self.augment, sample_key, reshape=self.task.kind == "classify"
            )
            self._put_target(row, members, image, size, sample_key, name)
        except Unreadable:
            raise
        except Exception as error:  # Pillow's and numpy's readers meet damaged data with errors of any kind
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if self.task.kind == "classify":
            row["labels"] = row["labels_other"] = label
        row["valid"] = True
        return row

    def mixed(self, row: Row, other: Row) -> Row:
        """Two rows of images as one, by augment.mixup or cutmix; the first one's key says how."""
        x, share = mix(row["x"], other["x"], self.augment, row["sample_keys"])
        return {**row, "x": x, "labels_other": other["labels"], "share": np.float32(share)}

    def empty_row(self, size: tuple[int, int], sample_key: int) -> Row:
        """A row in place of an image that there is not: zeros, no labels, valid False."""
        kinds, most = self.needs.kinds, self.config.max_boxes
        row: Row = {"x": np.zeros((self.config.channels, *size), np.float32), "tasks": self.task.number}
        if "classify" in kinds:
            row |= {"labels": -1, "labels_other": -1, "share": np.float32(1)}
        if "segment" in kinds:
            row["masks"] = np.full(size, -1, np.int64)
        if "detect" in kinds:
            row["boxes"] = np.zeros((most, 4), np.float32)
            row["box_labels"] = np.full(most, -1, np.int64)
        if self.needs.task_text is not None:
            row["text"] = np.zeros(self.needs.task_text, np.float32)
        return {**row, "valid": False, "sample_keys": sample_key}

    def packed_row(self, sample_key: int) -> Row:
        """As the other models'; labels are -1 where there is none."""
        row = super().packed_row(sample_key)
        return {**row, "labels": np.full(len(row["valid"]), -1, np.int64), "tasks": self.task.number}

    def _image(self, members: Mapping[str, bytes]) -> Image:
        data = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if data is None:
            raise ValueError(f"it has no image ({', '.join(IMAGE_SUFFIXES)})")
        return augment.decode(data, self.config.channels)

    def _put_target(
        self,
        row: Row,
        members: Mapping[str, bytes],
        image: Image,
        size: tuple[int, int],
        sample_key: int,
        name: str,
    ) -> None:
        """Mask, boxes or text of the sample, where x shows them."""
        kind, classes = self.task.kind, self.task.num_classes or 0
        whole = (image.height, image.width)
        part = augment.part(whole, size, self.augment, sample_key)
        mirror = augment.mirrored(self.augment, sample_key)
        if kind == "segment":
            mask = targets.read_mask(members[MASK], whole, classes)
            row["masks"] = targets.cut_mask(mask, part, size, mirror=mirror)
        elif kind == "detect":
            boxes, labels = targets.read_boxes(members[BOXES], classes)
            boxes, labels = targets.cut_boxes(boxes, labels, part, size, mirror=mirror)
            most = self.config.max_boxes
            if len(boxes) > most:
                self.cut.add(name)
            row["boxes"][: len(boxes)] = boxes[:most]
            row["box_labels"][: len(boxes)] = labels[:most]
        elif kind == "contrast":
            assert self.task.text is not None, "a task that contrasts has texts"
            row["text"] = read_text(members, self.task.text)


def decoder_of(
    config: ImageDataConfig,
    needs: ImageNeeds,
    source: ImageSourceConfig,
    augment: AugmentConfig,
    scale: LatentScale | None,
    cut: CutImages,
) -> Decoder:
    """What makes rows of a source's samples; scale: of latents."""
    task = needs.of(source).task
    if task is None:
        return Decoder(config, needs, augment, scale)
    return TaskDecoder(config, needs, augment, scale, task, cut)
