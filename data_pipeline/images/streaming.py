"""Shards that come as streams (https://, file:, pipe:), read by WebDataset's own pipeline.

What the rest of data_pipeline promises needs sizes and places that streams do not have. With data.stream
holds:

- Shards, not samples, have an order: that of epoch e is a permutation keyed by (seed, source, e). All epochs'
  shards one after the other are dealt to the data ranks in turn, so that ranks never share a shard, and may
  be fewer shards than ranks. A sample is in one shard's pass once; but ranks come through their shards at
  different speeds, so an epoch of all ranks has no sharp end.
- Order beyond that comes from a shuffle buffer of each rank, keyed too. So a run is repeated exactly by the
  same number of ranks with the same batch size, and by no other: what a step sees depends on the layout.
- A resumed run does not get the order it would have had. With stream.samples_per_shard it starts at the first
  shard that was not finished: of each rank, up to a shard and the shuffle buffer is read again, or left out
  if shards are shorter than said. Without it, the shards start anew in another order, keyed by the number of
  samples consumed.
- A sample that cannot be used gives its place to the next one (`valid` is True in all rows). It is counted
  and named as elsewhere, once, and so is a shard that breaks off or cannot be reached.
- An error in reading may be met by one rank alone, and then stops the run.

Validation data is never streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from triptych.data_pipeline.dataset import collate
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.faults import CutImages, Faults
from triptych.data_pipeline.images.index import BAD_LABEL, NO_LABEL, parse_label
from triptych.data_pipeline.images.needs import ImageNeeds
from triptych.data_pipeline.images.rows import Row, Unreadable
from triptych.data_pipeline.images.scaling import LatentScale, latent_scale
from triptych.data_pipeline.images.shards import expand, find_shards, is_url
from triptych.data_pipeline.images.tasks import decoder_of
from triptych.data_pipeline.order import Mixture, key, permutation

if TYPE_CHECKING:
    import torch


class StreamedImages:
    """Training data from streams; a BatchLoader asks `for_rank` for what its rank reads."""

    batch_size = None
    # A stream is read in its order, by one thread.
    threads = 1

    def __init__(self, config: ImageDataConfig, seed: int, needs: ImageNeeds | None = None) -> None:
        """As ImageDataset. Nothing is opened before the first sample is asked for."""
        self.config, self.seed, self.needs = config, seed, needs or ImageNeeds()
        self.needs.check(config)
        self.bad, self.cut = Faults(config.max_bad_samples), CutImages(config.max_boxes)
        self.urls = [_urls(source.path) for source in config.sources]
        self.mixture = Mixture(
            [source.weight for source in config.sources], [source.label for source in config.sources]
        )
        self.decoders = [
            decoder_of(config, self.needs, source, config.augment_of(source), self._scale(s), self.cut)
            for s, source in enumerate(config.sources)
        ]

    def _scale(self, s: int) -> LatentScale | None:
        if self.config.content == "images":
            return None
        source = self.config.sources[s]
        first = self.urls[s][0]
        description = None if is_url(first) else Description.read(Path(first).parent)
        return latent_scale(source.label, self.config, description, np.zeros(0))

    def for_rank(self, dp_rank: int, dp_size: int, global_batch_size: int) -> RankStream:
        """What data rank `dp_rank` of `dp_size` reads."""
        return RankStream(self, dp_rank, dp_size, global_batch_size)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """As ImageDataset's, without packing."""
        return collate(rows)

    def consumed(self, total: int) -> dict[str, int]:
        """Samples of each source among the first `total`, where each rank mixes its own alike."""
        labels = [source.label for source in self.config.sources]
        return dict(zip(labels, self.mixture.consumed(total)))


def _urls(path: str) -> list[str]:
    if is_url(path):
        return expand(path)
    return [str(shard) for shard in find_shards(path, streamed=True)]


class RankStream:
    """The samples of one rank, in the order of its batches; a call out of that order starts the streams anew,
    as a resumed run does."""

    def __init__(self, data: StreamedImages, dp_rank: int, dp_size: int, global_batch_size: int) -> None:
        self.data, self.dp_rank, self.dp_size = data, dp_rank, dp_size
        per_rank = global_batch_size // dp_size
        self._before, self._others = dp_rank * per_rank, global_batch_size - per_rank
        self._last: int | None = None
        # How many samples the rank has taken, by which it mixes the sources.
        self._taken = 0
        self._sources: list[Iterator[tuple[dict[str, Any], str]]] = []

    def sample(self, i: int) -> Row:
        """Global row i. Raises ValueError where a pass over all shards gave nothing, or too much was bad."""
        if self._last is None or i - self._last not in (1, 1 + self._others):
            start = i - self._before
            self._sources = [self._stream(s, start) for s in range(len(self.data.urls))]
            self._taken = start // self.dp_size
        self._last = i
        source, _ = self.data.mixture.locate(self._taken)
        self._taken += 1
        return self._row(source, key(self.data.seed, "sample", i) >> 1)

    def _row(self, s: int, sample_key: int) -> Row:
        """The next sample of source s that can be used."""
        data = self.data
        _, height, width = data.config.shapes[0]
        for in_a_row, (members, name) in enumerate(self._sources[s], start=1):
            try:
                label = self._label(s, members, name)
                return data.decoders[s].grid_row(members, label, (height, width), sample_key, name)
            except Unreadable as error:
                data.bad.add(name, str(error))
            # Those counted before do not count again, so that a stream of nothing else would not end.
            if in_a_row > data.config.max_bad_samples:
                raise ValueError(
                    f"{in_a_row} samples in a row could not be used, more than data.max_bad_samples="
                    f"{data.config.max_bad_samples}; the first of all are: {'; '.join(data.bad.names[:5])}"
                )
        raise AssertionError("streams do not end")

    def _label(self, s: int, members: dict[str, Any], name: str) -> int:
        """The sample's label. Raises Unreadable where it has none, ValueError where no class has it."""
        needs = self.data.needs.of(self.data.config.sources[s])
        classes = needs.num_classes
        if classes is None:
            return NO_LABEL
        label = parse_label(members)
        if label in (NO_LABEL, BAD_LABEL):
            raise Unreadable("it has no label that is an integer from 0 on")
        if label >= classes:
            raise ValueError(
                f"{name} has label {label}, outside 0 .. {classes - 1} ({needs.key}.num_classes); "
                "raise it, or write the shards again"
            )
        return label

    def _stream(self, s: int, start: int) -> Iterator[tuple[dict[str, Any], str]]:
        """The samples of source s by suffix, and their names, as a run goes on that has consumed `start`."""
        import webdataset

        data, options = self.data, self.data.config.stream
        assert options is not None, "only with data.stream"
        url, shards_since_sample = "", 0

        def shards() -> Iterator[dict[str, str]]:
            nonlocal url, shards_since_sample
            for url in self._urls(s, start):
                if shards_since_sample > len(data.urls[s]):
                    raise ValueError(
                        f"source {data.config.sources[s].label} gave no sample in a pass over its shards; "
                        f"check its URLs. {'; '.join(data.bad.names[:3])}"
                    )
                shards_since_sample += 1
                yield {"url": url}

        def counted(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            nonlocal shards_since_sample
            for sample in samples:
                shards_since_sample = 0
                yield sample

        def handle(error: Exception) -> bool:
            data.bad.add(url, f"{type(error).__name__}: {error}")
            return True

        shuffle = webdataset.shuffle(
            options.shuffle, rng=Random(key(data.seed, "buffer", s, start, self.dp_rank))
        )
        pipeline = webdataset.DataPipeline(
            shards, webdataset.tarfile_to_samples(handler=handle), counted, shuffle
        )
        for sample in pipeline:
            members = {suffix: value for suffix, value in sample.items() if not suffix.startswith("__")}
            yield members, f"{sample['__url__']}:{sample['__key__']}"

    def _urls(self, s: int, start: int) -> Iterator[str]:
        """The shards of source s that this rank reads, from `start` samples of all ranks on."""
        urls, options = self.data.urls[s], self.data.config.stream
        assert options is not None, "only with data.stream"
        anew, skipped = start, 0
        if options.samples_per_shard is not None:
            anew, skipped = 0, self.data.mixture.consumed(start)[s] // options.samples_per_shard
        for n in count(skipped + self.dp_rank, self.dp_size):
            epoch, place = divmod(n, len(urls))
            yield urls[permutation(len(urls), key(self.data.seed, "shards", s, anew, epoch))[place]]
