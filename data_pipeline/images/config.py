"""Section `data:` of a run on images or latents."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RandAugmentConfig(Section):
    """RandAugment (arXiv 1909.13719): operations drawn evenly, one after the other, all of one strength."""

    num_ops: int = Field(default=2, ge=1, le=16)
    """Operations on each image."""
    magnitude: float = Field(default=9.0, ge=0.0, le=10.0)
    """Strength of the operations that have one; 10: as strong as AutoAugment's strongest."""


class AugmentConfig(Section):
    """What is done to an image in training. Validation always takes the centre and never flips."""

    crop: Literal["none", "center", "random_resized"] = "center"
    """center: the shorter side is resized to fit, the rest cut off evenly (as ADM does, arXiv 2105.05233).
    random_resized: a random part of the image, resized. none: images must have the size already."""
    scale: tuple[float, float] = (0.08, 1.0)
    """For random_resized: the part's share of the image's area, between these."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """For random_resized: the part's width / height, between these, relative to that of the size wanted."""
    flip: bool = False
    """Every second image, chosen by its key, is mirrored left to right."""
    randaugment: RandAugmentConfig | None = None
    """For vision tasks: random changes of colours, and of shape where a task is to classify."""
    mixup: float = Field(default=0.0, ge=0.0)
    """For tasks that classify: each image is blended with another one of its source by a share drawn from
    Beta(mixup, mixup) (arXiv 1710.09412); 0: not."""
    cutmix: float = Field(default=0.0, ge=0.0)
    """The same with a box of the other image put in, of an area share from Beta(cutmix, cutmix) (arXiv
    1905.04899). With mixup too, every second image, chosen by its key, takes one or the other."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name, (low, high), limit in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name}=[{low}, {high}] must be rising, above 0 and at most {limit}")
        return self


class ImageSourceConfig(Section):
    """Shards of one data set. May be written as the path alone."""

    path: str = Field(min_length=1)
    """A directory of .tar files, one .tar file, or several in braces: `shards/{000000..000123}.tar`. With
    data.stream also URLs: https://..., file:..., pipe:aws s3 cp s3://bucket/{000..123}.tar -"""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights; any positive number."""
    name: str | None = None
    """Name in messages and in the saved data position; unset: the path."""
    task: str | None = None
    """For vision models: the task of model.tasks that the samples are for; with one task it may be unset."""
    augment: AugmentConfig | None = None
    """What is done to this source's images in training; unset: data.augment."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: float) -> float:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"weight={weight} must be a positive finite number; leave out a source not wanted"
            )
        return weight

    @property
    def label(self) -> str:
        """The name under which the source is reported and its position saved."""
        return self.name or self.path


class BucketConfig(Section):
    """Aspect-ratio buckets: sizes between which each image chooses; a global batch has one size."""

    sizes: tuple[tuple[int, int], ...] | None = None
    """The sizes, each [height, width]; or give area and aspects instead."""
    area: int | None = Field(default=None, ge=1)
    """Pixels (or latent positions) that each size has, nearly."""
    aspects: tuple[float, ...] | None = None
    """height / width of each size."""
    multiple: int = Field(default=16, ge=1)
    """With area and aspects: heights and widths are multiples of this."""

    @model_validator(mode="after")
    def _one_way(self) -> BucketConfig:
        by_area = self.area is not None or self.aspects is not None
        if (self.sizes is None) != by_area or (by_area and not (self.area and self.aspects)):
            raise ValueError(
                "buckets need either sizes ([[256, 256], [192, 320]]) or both area (65536) and aspects "
                "([1.0, 0.6]); give one of the two"
            )
        for size in self.sizes or ():
            if min(size) < 1:
                raise ValueError(f"sizes holds {list(size)}; heights and widths are at least 1")
        if any(not (math.isfinite(aspect) and aspect > 0) for aspect in self.aspects or ()):
            raise ValueError(f"aspects={self.aspects} must be positive numbers, height / width")
        return self

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each bucket, each once."""
        if self.sizes is not None:
            return tuple(dict.fromkeys(self.sizes))
        assert self.area is not None and self.aspects is not None, "refused by _one_way"

        def rounded(length: float) -> int:
            return max(1, round(length / self.multiple)) * self.multiple

        edges = [(math.sqrt(self.area * aspect), math.sqrt(self.area / aspect)) for aspect in self.aspects]
        return tuple(dict.fromkeys((rounded(height), rounded(width)) for height, width in edges))


class PackingConfig(Section):
    """Images of any aspect ratio as sequences of patches, several to a row (FiT, arXiv 2402.12376)."""

    max_tokens: int = Field(ge=1)
    """Tokens of a row."""
    max_images: int = Field(default=16, ge=1)
    """Most images in a row."""
    patch_size: int = Field(ge=1)
    """Edge of the square patch that makes a token; the model's."""
    max_image_tokens: int | None = Field(default=None, ge=1)
    """Tokens of an image, to which larger ones are resized down (FiT: 256); unset: max_tokens."""

    @model_validator(mode="after")
    def _fits(self) -> PackingConfig:
        if self.image_tokens > self.max_tokens:
            raise ValueError(
                f"max_image_tokens={self.max_image_tokens} does not fit a row of max_tokens="
                f"{self.max_tokens}; lower the first or raise the second"
            )
        return self

    @property
    def image_tokens(self) -> int:
        """Most tokens of an image."""
        return self.max_image_tokens or self.max_tokens


class VaeConfig(Section):
    """The autoencoder whose latents are read; what is set is held against the shards' dataset.json."""

    id: str | None = None
    """Its name or path as written by `triptych data latents --vae-id`; unset: not compared."""
    scale_factor: float | None = Field(default=None, gt=0)
    """Latents are (z - shift_factor) * scale_factor; unset: as dataset.json says."""
    shift_factor: float | None = None
    """See scale_factor; unset: as dataset.json says, or 0."""


class StreamConfig(Section):
    """Shards read as streams, as WebDataset does. The head of images/streaming.py says what holds then."""

    samples_per_shard: int | None = Field(default=None, ge=1)
    """Samples in each shard; given, a resumed run starts at the shard it had reached, unset: with another
    order of the shards."""
    shuffle: int = Field(default=1000, ge=1)
    """Samples between which the next is drawn; 1: in the order of the shard."""

    @model_validator(mode="before")
    @classmethod
    def _flag(cls, value: Any) -> Any:
        return {} if value is True else value


class ImageDataConfig(Section):
    """Section `data:` with `kind: images`: which shards, and what becomes of an image."""

    kind: Literal["images"] = "images"
    """Images or their latents in WebDataset shards."""
    sources: tuple[ImageSourceConfig, ...]
    """Training data, mixed by weight; of a vision model each for a task."""
    valid: tuple[ImageSourceConfig, ...] | None = None
    """Validation data, in the order of the files (weights are not used); unset: none. Never streamed."""
    content: Literal["images", "latents"] = "images"
    """images: png, jpg or webp, as pixels in [-1, 1]. latents: mean.npy and std.npy of an autoencoder's
    posterior, drawn from and scaled."""
    image_size: tuple[int, int] | None = None
    """[height, width] of a sample (of the latent, for latents), or one number for a square; unset with
    buckets or packing."""
    channels: int = Field(default=3, ge=1)
    """1 (grey) or 3 (red, green, blue), to which images are converted; or the latents' channels."""
    augment: AugmentConfig = AugmentConfig()
    """Crop and flip; latents have none."""
    buckets: BucketConfig | None = None
    """Several sizes, one to a global batch."""
    packing: PackingConfig | None = None
    """Rows of several images, each in its own size."""
    vae: VaeConfig = VaeConfig()
    """For latents: what encoded them."""
    max_boxes: int = Field(default=32, ge=1)
    """For tasks that detect: boxes that a row has places for; those beyond are left out of the image, and
    such images are counted."""
    max_bad_samples: int = Field(default=100, ge=0)
    """Samples that may be left out as unreadable; one more stops the run. Each rank counts those it met."""
    decode_threads: int = Field(default=1, ge=1)
    """Threads that read and decode on each rank; the order does not depend on it."""
    seed: int | None = None
    """Seed of the order of the data; unset: train.seed."""
    stream: StreamConfig | None = None
    """true, or options: the sources are streamed from URLs; not in one global order, not resumed exactly."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("stream", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value is False else value

    @field_validator("sources")
    @classmethod
    def _at_least_one(cls, sources: tuple[ImageSourceConfig, ...]) -> tuple[ImageSourceConfig, ...]:
        if not sources:
            raise ValueError("no source is listed; give at least one, such as data/digits/train")
        return sources

    @field_validator("sources", "valid")
    @classmethod
    def _distinct(cls, sources: tuple[ImageSourceConfig, ...] | None) -> tuple[ImageSourceConfig, ...] | None:
        labels = [source.label for source in sources or ()]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is listed twice; list each source once and raise its weight")
        return sources

    @model_validator(mode="after")
    def _consistent(self) -> ImageDataConfig:
        sized = [name for name in ("image_size", "buckets", "packing") if getattr(self, name) is not None]
        if len(sized) != 1:
            raise ValueError(
                f"{' and '.join(sized) or 'nothing'} says how large samples are; give exactly one of "
                "image_size (all alike), buckets (a size per batch) and packing (each its own size)"
            )
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size={list(self.image_size)} must be at least 1 each way")
        if self.content == "images" and self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: images have 1 (grey) or 3 (colour)")
        for augment in map(self.augment_of, self.sources):
            self._check_augment(augment)
        for source in self.valid or ():
            if source.augment is not None:
                raise ValueError(
                    f"validation source {source.label} has augment, and validation takes the centre of the "
                    "image as it is; remove it"
                )
        if self.stream is not None and self.image_size is None:
            raise ValueError(
                "buckets and packing need the sizes of all images beforehand, which streams do not have; "
                "use image_size, or shards on a file system"
            )
        return self

    def _check_augment(self, augment: AugmentConfig) -> None:
        changed = augment.crop == "random_resized" or augment.flip or augment.randaugment or augment.mixes
        if self.content == "latents" and changed:
            raise ValueError(
                "latents are not cropped or flipped, for that is not what the autoencoder makes of a cropped "
                "or flipped image; remove augment"
            )
        if self.packing is not None and augment.crop == "random_resized":
            raise ValueError("packing keeps whole images; use augment.crop: center (or none)")
        if augment.mixes and (self.packing is not None or self.stream is not None):
            key = "packing" if self.packing is not None else "stream"
            raise ValueError(
                f"augment.mixup={augment.mixup:g} and cutmix={augment.cutmix:g} take another image of the "
                f"same size from the source at random, which data.{key} does not have; remove either"
            )

    def augment_of(self, source: ImageSourceConfig) -> AugmentConfig:
        """What is done to the images of a source in training."""
        return source.augment or self.augment

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Every shape that a row's x may take: (C, H, W), or (T, p * p * C) with packing."""
        if self.packing is not None:
            return ((self.packing.max_tokens, self.packing.patch_size**2 * self.channels),)
        sizes = self.buckets.shapes if self.buckets is not None else (self.image_size,)
        return tuple((self.channels, *size) for size in sizes if size is not None)

    def num_tokens(self, patch_size: int) -> int:
        """Tokens of a row, the most where sizes differ.

        Raises ValueError if patch_size does not divide the sizes, or is another than packing's.
        """
        if self.packing is not None:
            if self.packing.patch_size != patch_size:
                raise ValueError(
                    f"data.packing.patch_size={self.packing.patch_size} is not "
                    f"model.patch_size={patch_size}; make them equal"
                )
            return self.packing.max_tokens
        for shape in self.shapes:
            if shape[1] % patch_size or shape[2] % patch_size:
                key = "data.image_size" if self.image_size else "data.buckets"
                raise ValueError(
                    f"model.patch_size={patch_size} does not divide {key} {list(shape[1:])}; use multiples "
                    f"of {patch_size}, such as "
                    f"{[max(1, edge // patch_size) * patch_size for edge in shape[1:]]}"
                )
        return max(shape[1] // patch_size * (shape[2] // patch_size) for shape in self.shapes)
