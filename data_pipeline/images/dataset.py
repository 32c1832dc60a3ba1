"""Training and validation images, by number: sample(i) is a row of a batch, a pure function of i.

A row is an image, or with packing several. The order follows from (files, configuration, seed, i) as it does
for text; ranks, micro-batches and threads know nothing of it and change nothing. Each usable sample is in one
row of its source's epoch.

    buckets   i // G is the global batch, which has one source and one size. A bucket's last batch of an epoch
              is filled up with rows whose `valid` is False. So the order depends on G, the global batch size.
    faults    What cannot be used by its headers (a torn shard, no image, no label) is left out when the
              shards are opened and stands in no row. What turns out unreadable when it is decoded keeps its
              row or its place in a pack, with zeros and `valid` False. Both are counted in `bad`, on each
              rank for itself, once per sample; more than data.max_bad_samples of them raise ValueError. A
              file system that refuses to read raises at once, as that may differ from rank to rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.dataset import collate
from triptych.data_pipeline.images.augment import CENTER, patches
from triptych.data_pipeline.images.config import AugmentConfig, ImageDataConfig, ImageSourceConfig
from triptych.data_pipeline.images.faults import CutImages, Faults
from triptych.data_pipeline.images.mixing import partner_of
from triptych.data_pipeline.images.needs import ImageNeeds
from triptych.data_pipeline.images.rows import Row, Unreadable, put
from triptych.data_pipeline.images.source import ImageSource
from triptych.data_pipeline.images.tasks import TaskDecoder, decoder_of
from triptych.data_pipeline.order import Mixture, key

if TYPE_CHECKING:
    import torch

    from triptych.data_pipeline.images.streaming import StreamedImages


class _ImageRows:
    """What training and validation share: sources, and rows from samples of them."""

    def __init__(
        self,
        sources: Sequence[ImageSourceConfig],
        config: ImageDataConfig,
        needs: ImageNeeds,
        augment: AugmentConfig | None,
        *,
        seed: int | None,
        global_batch_size: int | None,
    ) -> None:
        needs.check(config)
        if config.buckets is not None and global_batch_size is None:
            raise ValueError(
                "data.buckets are chosen per global batch; give its size (train.global_batch_size)"
            )
        self.config, self.needs = config, needs
        self.threads = config.decode_threads
        self.batch_size = global_batch_size if config.buckets is not None else None
        self.bad, self.cut = Faults(config.max_bad_samples), CutImages(config.max_boxes)
        self.sources = [
            ImageSource(source, s, config, needs, self.bad, seed=seed, batch_size=self.batch_size)
            for s, source in enumerate(sources)
        ]
        self._decoders = [
            decoder_of(config, needs, given, augment or config.augment_of(given), source.scale, self.cut)
            for given, source in zip(sources, self.sources)
        ]

    @property
    def num_images(self) -> int:
        """Usable images of all sources."""
        return sum(len(source) for source in self.sources)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Rows of one size as a batch of tensors.

        x: (B, C, H, W) float32, labels: (B,) for class and text: (B, L, E) for text conditioning, valid: (B,)
        bool, sample_keys: (B,). With packing x: (B, T, p*p*C), positions: (B, T, 2), document_ids: (B, T),
        sizes: (B, G, 2), labels, valid, image_keys: (B, G), sample_keys: (B,). Of vision models: see
        tasks.py.
        """
        return collate(rows)

    def _row(self, s: int, n: int, sample_key: int) -> Row:
        """Row n of source s, counted over all epochs."""
        source = self.sources[s]
        samples = source.row(n)
        if self.config.packing is not None:
            return self._packed(s, samples[samples >= 0], sample_key)
        size = self._size(0 if source.buckets is None else source.bucket(n))
        sample, decoder = int(samples[0]), self._decoders[s]
        row = self._grid_row(s, sample, size, sample_key) if sample >= 0 else None
        if row is None:
            return decoder.empty_row(size, sample_key)
        if isinstance(decoder, TaskDecoder) and decoder.mixes:
            partner = partner_of(sample, len(source), sample_key)
            key_of_partner = key(sample_key, "partner") >> 1
            other = None if partner is None else self._grid_row(s, partner, size, key_of_partner)
            return row if other is None else decoder.mixed(row, other)
        return row

    def _grid_row(self, s: int, sample: int, size: tuple[int, int], sample_key: int) -> Row | None:
        """The row of a sample of source s; None, and one more in `bad`, where it cannot be read."""
        source = self.sources[s]
        name, members = source.name(sample), source.read(sample)
        try:
            return self._decoders[s].grid_row(members, source.class_label(sample), size, sample_key, name)
        except Unreadable as error:
            self.bad.add(name, str(error))
        return None

    def _size(self, bucket: int) -> tuple[int, int]:
        _, height, width = self.config.shapes[bucket]
        return height, width

    def _packed(self, s: int, samples: npt.NDArray[np.int64], sample_key: int) -> Row:
        packing, source = self.config.packing, self.sources[s]
        assert packing is not None and source.grids is not None, "no packing"
        row = self._decoders[s].packed_row(sample_key)
        start, patch = 0, packing.patch_size
        for place, sample in enumerate(samples.tolist()):
            height, width = source.grids[sample].tolist()
            image_key = key(sample_key, "image", place) >> 1
            members = source.read(sample)
            tokens = None
            try:
                values = self._decoders[s].values(members, (height * patch, width * patch), image_key)
                tokens = patches(values, patch)
            except Unreadable as error:
                self.bad.add(source.name(sample), str(error))
            start = put(row, place, start, (height, width), tokens, source.class_label(sample), image_key)
        return row


class ImageDataset(_ImageRows):
    """Training data: sample(i) for any i >= 0, over as many epochs as it takes.

    `sources` (each with label, len() and samples_per_epoch, its rows), `bad` (see the head of this file),
    `batch_size` (the global batch that the order is made for; None: any), `threads` (that may decode).
    """

    def __init__(
        self,
        config: ImageDataConfig,
        seed: int,
        needs: ImageNeeds | None = None,
        *,
        global_batch_size: int | None = None,
    ) -> None:
        """seed: of the order; needs: what the model asks for; global_batch_size: needed with data.buckets.

        Raises ValueError for shards or a configuration that cannot serve, naming the mend.
        """
        super().__init__(
            config.sources,
            config,
            needs or ImageNeeds(),
            None,
            seed=seed,
            global_batch_size=global_batch_size,
        )
        self.seed = seed
        # With buckets whole batches are mixed, not rows.
        self._unit = self.batch_size or 1
        self.mixture = Mixture(
            [source.weight for source in config.sources], [source.label for source in config.sources]
        )

    def sample(self, i: int) -> Row:
        """Row i of the global order."""
        unit, place = divmod(i, self._unit)
        s, nth = self.mixture.locate(unit)
        return self._row(s, nth * self._unit + place, key(self.seed, "sample", i) >> 1)

    def consumed(self, total: int) -> dict[str, int]:
        """Rows of each source among the first `total`."""
        units, rest = divmod(total, self._unit)
        counts = [count * self._unit for count in self.mixture.consumed(units)]
        counts[self.mixture.locate(units)[0]] += rest
        return {source.label: count for source, count in zip(self.sources, counts)}


class ImageValidation(_ImageRows):
    """Validation data: the sources' rows one after the other, in the order of the files (of sizes, where they
    are packed), one pass; centre crop, no flips.

    len() is the number of rows. sample(i) past the end is a row whose `valid` is False, so that the last
    global batch may be filled up whatever its size.
    """

    def __init__(
        self,
        config: ImageDataConfig,
        needs: ImageNeeds | None = None,
        *,
        global_batch_size: int | None = None,
        limit: int | None = None,
    ) -> None:
        """limit: use only that many rows, evenly spread over all, and always the same; with buckets, as many
        whole batches as that takes. Of a vision model's data so many of each source, for each has a task to
        tell of. Otherwise as ImageDataset."""
        if not config.valid:
            raise ValueError("data.valid names no validation data")
        super().__init__(
            config.valid,
            config,
            needs or ImageNeeds(),
            CENTER,
            seed=None,
            global_batch_size=global_batch_size,
        )
        self._unit = self.batch_size or 1
        counts = [source.samples_per_epoch for source in self.sources]
        self._ends = np.cumsum(counts)
        # Rows among which `limit` is taken, in units, and how many are: all together, or of each source.
        groups = counts if self.needs.tasks is not None else [sum(counts)]
        self._there = [count // self._unit for count in groups]
        self._taken = [
            count if limit is None else min(-(-limit // self._unit), count) for count in self._there
        ]

    def __len__(self) -> int:
        return sum(self._taken) * self._unit

    def sample(self, i: int) -> Row:
        """Row i of the pass; without an image for i >= len()."""
        sample_key = key("validation", i) >> 1
        if i >= len(self):
            if self.config.packing is not None:
                return self._decoders[0].packed_row(sample_key)
            return self._decoders[0].empty_row(self._size(0), sample_key)
        s, n = self._locate(i)
        return self._row(s, n, sample_key)

    def consumed(self, total: int) -> dict[str, int]:
        """Rows of each source among the first `total` of the pass."""
        counts = [0] * len(self.sources)
        for i in range(min(total, len(self))):
            counts[self._locate(i)[0]] += 1
        return {source.label: count for source, count in zip(self.sources, counts)}

    def _locate(self, i: int) -> tuple[int, int]:
        """(source, row of it) of row i."""
        unit, place = divmod(i, self._unit)
        before = 0
        for there, taken in zip(self._there, self._taken):
            if unit < taken:
                break
            unit, before = unit - taken, before + there
        n = (before + unit * there // taken) * self._unit + place
        source = int(np.searchsorted(self._ends, n, side="right"))
        return source, n - (int(self._ends[source - 1]) if source else 0)


def open_training(
    config: ImageDataConfig,
    seed: int,
    needs: ImageNeeds | None = None,
    *,
    global_batch_size: int | None = None,
) -> ImageDataset | StreamedImages:
    """The training data of section `data:`: an ImageDataset, or StreamedImages with data.stream.

    seed: train.seed, used where data.seed is None. needs: what the model asks for. global_batch_size:
    train.global_batch_size, needed with data.buckets. Raises ValueError for data that cannot serve.
    """
    chosen = seed if config.seed is None else config.seed
    if config.stream is not None:
        from triptych.data_pipeline.images.streaming import StreamedImages

        return StreamedImages(config, chosen, needs)
    return ImageDataset(config, chosen, needs, global_batch_size=global_batch_size)


def open_validation(
    config: ImageDataConfig,
    needs: ImageNeeds | None = None,
    *,
    global_batch_size: int | None = None,
    limit: int | None = None,
) -> ImageValidation | None:
    """The validation data of section `data:`, None if it names none; limit: the most rows to use."""
    if not config.valid:
        return None
    return ImageValidation(config, needs, global_batch_size=global_batch_size, limit=limit)
