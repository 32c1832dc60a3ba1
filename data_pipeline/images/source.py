"""One source: its shards, the samples that are usable, their sizes, and the rows of its epochs.

A sample is counted among the usable ones of its source.

N samples, R rows of an epoch, K images in a row
"""

from __future__ import annotations

from threading import Lock

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.config import ImageDataConfig, ImageSourceConfig
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.faults import Faults
from triptych.data_pipeline.images.index import MEAN
from triptych.data_pipeline.images.needs import ImageNeeds, SampleCheck, check_classes, usable
from triptych.data_pipeline.images.plan import (
    BucketPlan,
    PackedPlan,
    Plan,
    SinglePlan,
    fit_tokens,
    nearest_bucket,
)
from triptych.data_pipeline.images.rows import load_array
from triptych.data_pipeline.images.scaling import LatentScale, latent_scale
from triptych.data_pipeline.images.shards import Shards, find_shards
from triptych.data_pipeline.order import key

_SAMPLED = 64


class ImageSource:
    """The usable samples of one source, and the rows of each of its epochs.

    len() is the number of samples; `samples_per_epoch` that of rows, which differs with buckets and packing.
    Keeps the orders of two epochs: 16 bytes per sample and epoch.
    """

    def __init__(
        self,
        source: ImageSourceConfig,
        position: int,
        config: ImageDataConfig,
        needs: ImageNeeds,
        faults: Faults,
        *,
        seed: int | None,
        batch_size: int | None,
    ) -> None:
        """position: which source of the list; seed: None means the order of the files; batch_size: of
        buckets.

        Raises ValueError for a source without usable samples, or one that does not fit the configuration.
        """
        self.label, self.position, self.seed = source.label, position, seed
        paths = find_shards(source.path)
        description = Description.read(paths[0].parent)
        if description is not None and description.kind != config.content:
            raise ValueError(
                f"source {self.label} holds {description.kind} (dataset.json) and "
                f"data.content={config.content}; make them agree, or write the shards wanted with `triptych "
                "data latents` or `images`"
            )
        asked = needs.of(source)
        check_classes(self.label, description, asked)
        self.shards = Shards(paths)
        self.samples = usable(self.shards, config, asked, faults)
        if not len(self.samples):
            raise ValueError(
                f"source {self.label} has no usable sample in {len(paths)} shards; "
                f"{'; '.join(faults.names[:3])}"
            )
        SampleCheck(self.label, self.shards, self.samples, config, asked).run()
        sizes = self.shards.images if config.content == "images" else self.shards.latents[:, 1:]
        self.scale = self._scale(config, description) if config.content == "latents" else None
        self.grids: npt.NDArray[np.int64] | None = None
        """(N, 2) height and width in tokens, with packing."""
        self.buckets: npt.NDArray[np.int64] | None = None
        """(N,) place of each sample's size in data.buckets."""
        self.plan = self._plan(config, sizes[self.samples], batch_size)
        self.samples_per_epoch = self.plan.num_rows
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, sample: int) -> str:
        """`shard.tar:key`."""
        return self.shards.name(int(self.samples[sample]))

    def class_label(self, sample: int) -> int:
        """The sample's label; negative where it has none."""
        return int(self.shards.labels[self.samples[sample]])

    def read(self, sample: int) -> dict[str, bytes]:
        """The members of a sample by suffix; raises what Shards.read raises."""
        return self.shards.read(int(self.samples[sample]))

    def row(self, n: int) -> npt.NDArray[np.int64]:
        """(K,) samples of row n, counted over all epochs; -1 where there is none."""
        number, k = divmod(n, self.samples_per_epoch)
        return self._epoch(number)[k]

    def bucket(self, n: int) -> int:
        """The bucket of the batch that row n is in."""
        assert self.buckets is not None, "asked for a bucket where there are none"
        number, k = divmod(n, self.samples_per_epoch)
        # The first row of a batch is never one of those that fill it up.
        return int(self.buckets[self._epoch(number)[k - k % self.plan.unit, 0]])

    def _epoch(self, number: int) -> npt.NDArray[np.int64]:
        """(R, K) the rows of an epoch."""
        with self._lock:
            if number not in self._epochs:

                def keys(purpose: str) -> int:
                    assert self.seed is not None, "the order of the files has no key"
                    return key(self.seed, purpose, self.position, number)

                # Two are kept, for around an epoch's end threads read in both.
                self._epochs = {n: rows for n, rows in self._epochs.items() if abs(n - number) == 1}
                self._epochs[number] = self.plan.epoch(None if self.seed is None else keys)
            return self._epochs[number]

    def _plan(self, config: ImageDataConfig, sizes: npt.NDArray[np.int32], batch_size: int | None) -> Plan:
        """How samples become rows; sizes: (N, 2) height, width."""
        if config.buckets is not None:
            assert batch_size is not None, "buckets are made for a global batch"
            self.buckets = nearest_bucket(sizes, config.buckets.shapes)
            return BucketPlan(self.buckets, batch_size)
        if config.packing is not None:
            packing = config.packing
            self.grids = fit_tokens(sizes, packing.patch_size, packing.image_tokens)
            return PackedPlan(self.grids.prod(axis=1), packing.max_tokens, packing.max_images)
        return SinglePlan(len(sizes))

    def _scale(self, config: ImageDataConfig, description: Description | None) -> LatentScale:
        """Of latents, with the values of some held against what is said of them."""
        chosen = np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(np.int64)
        values = []
        for sample in chosen:
            try:
                values.append(load_array(self.read(int(sample))[MEAN]).astype(np.float64).ravel())
            except ValueError:
                continue  # it is met again, and counted, when it is drawn
        found = np.concatenate([np.zeros(0), *values])
        return latent_scale(self.label, config, description, found[np.isfinite(found)])
