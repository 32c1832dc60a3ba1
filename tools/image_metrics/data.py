"""The real images of a run's own data as a set to compare samples with."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch

from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.images.dataset import ImageValidation
from triptych.data_pipeline.images.needs import ImageNeeds
from triptych.tools.image_metrics.images import ImageSet, array_images
from triptych.training.pictures import to_uint8


def data_images(
    config: ImageDataConfig,
    size: tuple[int, int],
    *,
    split: Literal["train", "valid"] = "train",
    num_classes: int | None = None,
    limit: int | None = None,
) -> ImageSet:
    """The images of section `data:` in the order of the files, cut to `size` (H, W) at their centre.

    They are held in memory. num_classes: of a class-conditional model; None: no labels are read. limit: the
    most images to take, spread evenly over all. Images that cannot be read are left out and counted, as in
    training. Raises ValueError for latents, streams, a split that there is not, and shards that cannot serve.
    """
    sources = config.sources if split == "train" else config.valid
    if config.content != "images":
        raise ValueError(
            "the run's data are latents, which no extractor sees; give a reference of images, such as an .npz"
        )
    if config.stream is not None:
        raise ValueError("the run's data are streamed (data.stream); give a reference, such as an .npz")
    if sources is None:
        raise ValueError("the run's configuration names no validation data (data.valid); use split train")
    # Buckets and packing are ways of feeding a model; here all images get one size.
    one_size = {"image_size": size, "buckets": None, "packing": None, "sources": sources, "valid": sources}
    plain = ImageDataConfig.model_validate(config.model_dump() | one_size)
    dataset = ImageValidation(plain, ImageNeeds(num_classes=num_classes), limit=limit)
    images, labels = [], []
    for number in range(len(dataset)):
        row = dataset.sample(number)
        if row["valid"]:
            images.append(to_uint8(torch.from_numpy(row["x"])[None])[0])
            labels.append(row.get("labels", 0))
    name = f"{', '.join(source.label for source in sources)} ({split})"
    if not images:
        raise ValueError(f"{name} holds no image that can be read; {'; '.join(dataset.bad.names[:3])}")
    found = array_images(np.stack(images), None if num_classes is None else np.array(labels), name)
    return dataclasses.replace(found, left_out=len(dataset.bad))
