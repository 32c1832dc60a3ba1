"""Options of `triptych data digits`, `images`, `coco`, `masks` and `latents`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from triptych.data_pipeline.images.config import Section


class DigitsOptions(Section):
    """What `triptych data digits` is asked to build: scikit-learn's 1,797 handwritten digits, 8 x 8 grey."""

    task: Literal["classify", "detect", "segment"] = "classify"
    """classify: the digits as they are. detect, segment: canvases of one to four of them, with boxes or
    masks."""
    out: str = Field(default="data/digits", min_length=1)
    """Directory of the shards: train/, valid/, manifest.json. Unset: data/digits, data/digits-detect or
    data/digits-segment."""
    size: int = Field(default=8, ge=8)
    """Edge of the images in pixels; digits above 8 are resized (bicubic). Unset: 8, and 32 for canvases."""
    train_images: int = Field(default=3000, ge=1)
    """Canvases for training."""
    valid_images: int = Field(default=500, ge=1)
    """Canvases for validation, of the digits held out."""
    seed: int = 0
    """Of the canvases; each is a function of the seed and its number."""
    shards: int = Field(default=4, ge=1, le=100)
    """Shards of the training split; the validation split has about a quarter as many."""
    valid_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of each class held out for validation, chosen by a hash of the pixels."""
    overwrite: bool = False
    """Replace shards in `out` that were made with other options."""

    @model_validator(mode="before")
    @classmethod
    def _by_task(cls, values: Any) -> Any:
        """What depends on the task where it is not given."""
        if not isinstance(values, dict) or values.get("task", "classify") == "classify":
            return values
        return {"out": f"data/digits-{values['task']}", "size": 32, **values}

    @model_validator(mode="after")
    def _room(self) -> DigitsOptions:
        if self.task != "classify" and self.size < 24:
            raise ValueError(f"size={self.size} has no room for several digits; use at least 24")
        return self


class ShardOptions(Section):
    """What the commands that read image files have in common."""

    out: str = Field(min_length=1)
    """Directory of the shards: train/, valid/, manifest.json."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Images of a shard; the last one has fewer."""
    valid_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share held out by a hash of the content, where no images for validation are given; 0: none."""
    max_bad_samples: int = Field(default=100, ge=0)
    """Files that may be left out because they cannot be used; one more stops the building."""
    overwrite: bool = False
    """Replace shards in `out` that were made with other options."""


class ImageFolderOptions(ShardOptions):
    """What `triptych data images` is asked to build: shards of a folder of images, one subfolder per
    class."""

    source: str = Field(min_length=1)
    """Directory of one subdirectory per class; or of train/ and valid/ (or val/), each with those."""


class CocoOptions(ShardOptions):
    """What `triptych data coco` is asked to build: shards of images with boxes."""

    images: str = Field(min_length=1)
    """Directory of the image files."""
    annotations: str = Field(min_length=1)
    """JSON file of COCO's format, such as instances_train2017.json."""
    valid_images: str | None = Field(default=None, min_length=1)
    """Directory of the image files for validation; unset: valid_share of the others."""
    valid_annotations: str | None = Field(default=None, min_length=1)
    """Their JSON file, with the same categories."""

    @model_validator(mode="after")
    def _both(self) -> CocoOptions:
        if (self.valid_images is None) != (self.valid_annotations is None):
            raise ValueError("valid_images and valid_annotations go together; give both or neither")
        return self


class MaskOptions(ShardOptions):
    """What `triptych data masks` is asked to build: shards of images with masks of classes."""

    images: str = Field(min_length=1)
    """Directory of the image files."""
    masks: str = Field(min_length=1)
    """Directory of the masks: for each image a PNG file of the same name, in the same subdirectory."""
    valid_images: str | None = Field(default=None, min_length=1)
    """Directory of the image files for validation; unset: valid_share of the others."""
    valid_masks: str | None = Field(default=None, min_length=1)
    """Directory of their masks."""

    @model_validator(mode="after")
    def _both(self) -> MaskOptions:
        if (self.valid_images is None) != (self.valid_masks is None):
            raise ValueError("valid_images and valid_masks go together; give both or neither")
        return self


class LatentsOptions(Section):
    """What `triptych data latents` is asked to build: shards of latents from shards of images."""

    source: str = Field(min_length=1)
    """Directory of image shards, or of splits (train/, valid/) with shards in each."""
    vae: str = Field(min_length=1)
    """Directory of diffusers' AutoencoderKL (config.json and .safetensors), or of a pipeline with vae/ in
    it."""
    out: str = Field(min_length=1)
    """Directory of the shards, split as the source is."""
    vae_id: str | None = Field(default=None, min_length=1)
    """Name of the autoencoder to write into dataset.json; unset: the last part of its path."""
    image_size: int | None = Field(default=None, ge=1)
    """Images are resized and cut to this many pixels each way; or give sizes, or max_tokens."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """Each image is resized and cut to the [height, width] nearest in aspect ratio (for data.buckets)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Each image keeps its aspect ratio and is resized down to at most so many squares of `multiple` pixels
    (for data.packing: its max_image_tokens)."""
    multiple: int = Field(default=16, ge=1)
    """With max_tokens: heights and widths are multiples of this; the autoencoder's factor times the patch."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type in which means and standard deviations are stored."""
    batch_size: int = Field(default=8, ge=1)
    """Images encoded at a time."""
    device: str = "cpu"
    """Where the autoencoder runs: cpu, cuda, cuda:1."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Latents of a shard; the last one has fewer."""
    max_bad_samples: int = Field(default=100, ge=0)
    """Samples that may be left out as unreadable; one more stops the building."""
    overwrite: bool = False
    """Replace shards in `out` that were made with other options."""

    @model_validator(mode="after")
    def _one_size(self) -> LatentsOptions:
        given = [name for name in ("image_size", "sizes", "max_tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} says how large the images are to be; give exactly one "
                "of image_size, sizes and max_tokens"
            )
        return self
