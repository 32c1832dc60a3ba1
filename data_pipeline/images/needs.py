"""What a model asks of its images, and whether a source and its configuration can give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.config import ImageDataConfig, ImageSourceConfig
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.faults import Faults
from triptych.data_pipeline.images.index import (
    BAD_LABEL,
    BOXES,
    IMAGE_SUFFIXES,
    MASK,
    MAX_PIXELS,
    MEAN,
    NO_LABEL,
    STD,
    TEXT,
    UNREADABLE,
)
from triptych.data_pipeline.images.shards import Shards

TaskKind = Literal["classify", "segment", "detect", "contrast"]
_MEMBERS = {"segment": MASK, "detect": BOXES}


@dataclass(frozen=True)
class TaskNeeds:
    """What one of a vision model's tasks asks of the data."""

    kind: TaskKind
    """classify: cls, or label in json. segment: mask.png. detect: boxes.json. contrast: text.npy."""
    number: int
    """Its place among the model's tasks."""
    num_classes: int | None = None
    """Labels are 0 .. num_classes - 1; contrast has none."""
    text: tuple[int, int] | None = None
    """For contrast: tokens and channels of an embedded text."""


@dataclass(frozen=True)
class SampleNeeds:
    """What each sample of one source must have."""

    num_classes: int | None
    """One label, 0 .. num_classes - 1; None: no label."""
    text: tuple[int, int] | None
    member: str | None
    """Besides the image: mask.png or boxes.json."""
    key: str
    """Where the model says so, for messages."""
    task: TaskNeeds | None = None
    """The source's task, of vision models."""


@dataclass(frozen=True)
class ImageNeeds:
    """What the model asks of the data; None where it does not care."""

    channels: int | None = None
    """model.in_channels."""
    size: tuple[int, ...] | None = None
    """model.input_size, where the model takes no other. Packing is not held against it."""
    patch_size: int | None = None
    """model.patch_size."""
    num_classes: int | None = None
    """Class conditioning: labels are 0 .. num_classes - 1, and the batch has them. None: no labels."""
    text: tuple[int, int] | None = None
    """Text conditioning: tokens and channels of an embedded text, which the batch then has. None: no text."""
    tasks: Mapping[str, TaskNeeds] | None = None
    """A vision model's tasks by name, in the order of their numbers. None: another model."""

    @property
    def kinds(self) -> frozenset[TaskKind]:
        """The kinds of tasks, each of which has its keys in every row."""
        return frozenset(task.kind for task in (self.tasks or {}).values())

    @property
    def task_text(self) -> tuple[int, int] | None:
        """Tokens and channels of the texts of tasks that contrast, which all have the same."""
        return next((task.text for task in (self.tasks or {}).values() if task.kind == "contrast"), None)

    def of(self, source: ImageSourceConfig) -> SampleNeeds:
        """What the samples of a source must have. Raises ValueError for a task unknown or not named."""
        if self.tasks is None:
            if source.task is not None:
                raise ValueError(
                    f"source {source.label} has task={source.task}, and the model has no tasks (family "
                    "vision has); remove it"
                )
            return SampleNeeds(self.num_classes, self.text, None, "model.conditioning")
        names = ", ".join(self.tasks)
        if source.task is None and len(self.tasks) > 1:
            raise ValueError(
                f"source {source.label} does not say which of model.tasks ({names}) its samples are for; "
                f"write {{path: {source.path}, task: {next(iter(self.tasks))}}}"
            )
        name = source.task if source.task is not None else next(iter(self.tasks))
        if name not in self.tasks:
            raise ValueError(
                f"source {source.label} has task={name}, and model.tasks has {names}; use one of those"
            )
        task = self.tasks[name]
        labels = task.num_classes if task.kind == "classify" else None
        text = task.text if task.kind == "contrast" else None
        return SampleNeeds(labels, text, _MEMBERS.get(task.kind), f"model.tasks.{name}", task)

    def check(self, config: ImageDataConfig) -> None:
        """Raises ValueError where section `data:` alone cannot give what the model asks for."""
        if self.channels is not None and config.channels != self.channels:
            raise ValueError(
                f"data.channels={config.channels} is not model.in_channels={self.channels}; make them equal"
            )
        others = [shape[1:] for shape in config.shapes if config.packing is None and shape[1:] != self.size]
        if self.size is not None and others:
            key = "data.image_size" if config.image_size else "data.buckets"
            raise ValueError(
                f"{key}={list(others[0])} is not model.input_size={list(self.size)}; make them equal, or use "
                "model.position: rope, which takes other sizes"
            )
        if self.patch_size is not None:
            config.num_tokens(self.patch_size)
        if self.text is not None and config.packing is not None:
            raise ValueError("data.packing has no text; use model.conditioning.kind: class or none")
        for source in (*config.sources, *(config.valid or ())):
            self.of(source)
        self._check_tasks(config)

    def _check_tasks(self, config: ImageDataConfig) -> None:
        augments = [config.augment_of(source) for source in config.sources]
        if any(each.mixes for each in augments) and "classify" not in self.kinds:
            raise ValueError(
                "data.augment.mixup and cutmix blend the labels of images, which only tasks of kind classify "
                "have; remove them"
            )
        if self.tasks is None:
            if any(each.randaugment for each in augments):
                raise ValueError("data.augment.randaugment is for the tasks of vision models; remove it")
            return
        if config.content == "latents":
            raise ValueError("vision models read pixels; use data.content: images")
        if config.packing is not None and self.kinds != {"classify"}:
            others = [name for name, task in self.tasks.items() if task.kind != "classify"]
            raise ValueError(
                f"data.packing has labels for whole images only, and model.tasks.{others[0]} is of kind "
                f"{self.tasks[others[0]].kind}; use data.image_size or data.buckets"
            )
        texts = {task.text for task in self.tasks.values() if task.kind == "contrast"}
        if len(texts) > 1:
            raise ValueError(
                f"tasks of kind contrast have texts of {sorted(map(str, texts))} tokens and channels, and a "
                "batch has one shape; make their text_length and text_size equal"
            )


def usable(
    shards: Shards, config: ImageDataConfig, needs: SampleNeeds, faults: Faults
) -> npt.NDArray[np.int64]:
    """The samples that have everything needed; the others, and torn shards, are added to `faults`."""
    for shard, fault in shards.faults:
        faults.add(shard, fault)
    good = np.ones(len(shards), np.bool_)
    for bad, reason in _requirements(shards, config, needs):
        for n in np.flatnonzero(good & bad):
            faults.add(shards.name(int(n)), reason)
        good &= ~bad
    return np.flatnonzero(good)


def _requirements(
    shards: Shards, config: ImageDataConfig, needs: SampleNeeds
) -> list[tuple[npt.NDArray[np.bool_], str]]:
    """(samples that fail it, reason) of each thing a sample must have."""
    found: list[tuple[npt.NDArray[np.bool_], str]] = []
    if config.content == "images":
        pixels = shards.images.astype(np.int64).prod(axis=1)
        found = [
            (~shards.having(*IMAGE_SUFFIXES), f"has no image ({', '.join(IMAGE_SUFFIXES)})"),
            (shards.images[:, 0] == UNREADABLE, "the header of its image is damaged"),
            (pixels > MAX_PIXELS, f"its image has more than {MAX_PIXELS} pixels"),
        ]
    else:
        found = [(~shards.having(suffix), f"has no {suffix}") for suffix in (MEAN, STD)]
        bad_header = shards.latents[:, 0] == UNREADABLE
        found.append((bad_header, f"its {MEAN} is no array of floating-point numbers (C, h, w)"))
    if needs.num_classes is not None:
        found.append((shards.labels == NO_LABEL, "has no label (cls, or label in json)"))
        found.append((shards.labels == BAD_LABEL, "its label is no integer from 0 on"))
    if needs.text is not None:
        found.append((~shards.having(TEXT), f"has no {TEXT}"))
        bad_text = shards.texts[:, 0] == UNREADABLE
        found.append((bad_text, f"its {TEXT} is no array of floating-point numbers (L, E)"))
    if needs.member is not None:
        found.append((~shards.having(needs.member), f"has no {needs.member}"))
    return found


def check_classes(label: str, description: Description | None, needs: SampleNeeds) -> None:
    """Raises ValueError where dataset.json names more classes than a task that segments or detects has."""
    if needs.task is None or needs.task.kind not in _MEMBERS or description is None:
        return
    classes, most = description.classes or (), needs.task.num_classes
    if most is not None and len(classes) > most:
        raise ValueError(
            f"source {label} has {len(classes)} classes (dataset.json), and {needs.key}.num_classes={most}; "
            f"set it to {len(classes)}"
        )


@dataclass(frozen=True)
class SampleCheck:
    """What is no damage but a mistake: labels, texts, channels or sizes of usable samples that do not fit."""

    label: str
    """The source's, for messages."""
    shards: Shards
    samples: npt.NDArray[np.int64]
    config: ImageDataConfig
    needs: SampleNeeds

    def run(self) -> None:
        """Raises ValueError with the first sample that does not fit, and the mend."""
        self._conditioning()
        if self.config.content == "latents":
            self._refuse(
                self.shards.latents[self.samples, 0] != self.config.channels,
                f"have another number of channels than data.channels={self.config.channels}",
                "Set data.channels (and model.in_channels) as the autoencoder has it",
                self.shards.latents,
            )
        if self.config.content == "latents" or self.config.augment.crop == "none":
            self._exact_sizes()

    def _conditioning(self) -> None:
        classes = self.needs.num_classes
        if classes is not None:
            self._refuse(
                self.shards.labels[self.samples] >= classes,
                f"have labels outside 0 .. {classes - 1} ({self.needs.key}.num_classes)",
                "Raise num_classes, or write the shards again with labels from 0 on",
                self.shards.labels,
            )
        if self.needs.text is not None:
            length, size = self.needs.text
            texts = self.shards.texts[self.samples]
            self._refuse(
                (texts[:, 0] > length) | (texts[:, 1] != size),
                f"have embedded texts that do not fit {self.needs.key}: text_length={length}, "
                f"text_size={size}",
                "Set both as the shards have them (shorter texts are filled up with zeros)",
                self.shards.texts,
            )

    def _exact_sizes(self) -> None:
        """For samples that are not resized."""
        config = self.config
        all_sizes = self.shards.images if config.content == "images" else self.shards.latents[:, 1:]
        sizes = all_sizes[self.samples]
        if config.packing is not None:
            patch, most = config.packing.patch_size, config.packing.image_tokens
            self._refuse(
                (sizes % patch != 0).any(axis=1) | ((sizes // patch).prod(axis=1) > most),
                f"have sizes that are no multiples of data.packing.patch_size={patch}, or give more than "
                f"{most} tokens",
                "Write the shards again in sizes that fit, or raise data.packing.max_image_tokens",
                all_sizes,
            )
            return
        allowed = np.array([shape[1:] for shape in config.shapes])
        key = "data.buckets" if config.buckets is not None else "data.image_size"
        cropped = "" if config.content == "latents" else "use data.augment.crop: center, or "
        self._refuse(
            ~(sizes[:, None, :] == allowed[None]).all(axis=2).any(axis=1),
            f"have a size (height, width) that is not in {key}={allowed.tolist()}",
            f"To mend it, {cropped}set {key} to the sizes of the shards",
            all_sizes,
        )

    def _refuse(
        self, wrong: npt.NDArray[np.bool_], told: str, mend: str, values: npt.NDArray[np.generic]
    ) -> None:
        if wrong.any():
            n = int(self.samples[np.flatnonzero(wrong)[0]])
            raise ValueError(
                f"{int(wrong.sum())} of {len(self.samples)} samples of source {self.label} {told}; the first "
                f"is {self.shards.name(n)} with {values[n].tolist()}. {mend}"
            )
