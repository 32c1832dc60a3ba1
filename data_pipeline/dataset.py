"""Documents packed into samples, in one global order that knows nothing of ranks.

An epoch of a source: its documents in an order keyed by (seed, source, epoch), back to back as the file
holds them (our files end each document with the end-of-document token, as Megatron's do with
--append-eod). Sample k of the epoch's S = (tokens - 1) // T is tokens[k*T : k*T + T + 1]: T tokens of
input, and the same shifted by one as targets. Neighbours share one token, and every token is a target
once, but for the epoch's first and its tail of fewer than T. The samples are shuffled as well. A target
in another document than its input is IGNORE. Sources are mixed by `order.Mixture`.

T length of a sample
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.config import SourceConfig
from triptych.data_pipeline.indexed import IndexedTokens
from triptych.data_pipeline.order import Mixture, key, permutation

if TYPE_CHECKING:
    import torch

IGNORE = -100


class Sample(TypedDict):
    """One row of a batch."""

    tokens: npt.NDArray[np.int64]  # (T,)
    targets: npt.NDArray[np.int64]  # (T,) token that follows, or IGNORE
    document_ids: npt.NDArray[np.int64]  # (T,) 0, 1, ... in the order the documents come in this row
    sample_keys: int  # in [0, 2**63), a function of (seed, global sample number)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of arrays and numbers, alike in names and shapes, as one batch of tensors (rows, ...).

    Python's integers become int64, its truth values bool; arrays keep their type.
    """
    # Not at the head: the processes that build a corpus import this file, and torch takes them a second.
    import torch

    return {name: torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows])) for name in rows[0]}


@dataclass(frozen=True)
class _Epoch:
    """One pass over a source: where each document starts in the stream, and the order of the samples."""

    number: int
    documents: npt.NDArray[np.int64]  # (D,) document numbers in the file
    starts: npt.NDArray[np.int64]  # (D + 1,) their first token in the epoch's stream
    samples: npt.NDArray[np.int64] | None  # (S,) or None for the identity


class PackedSource:
    """One source cut into samples. Keeps one epoch's order: 16 bytes per document, 8 per sample."""

    def __init__(
        self, config: SourceConfig, position: int, seq_len: int, seed: int | None, vocab_size: int | None
    ) -> None:
        """position: which source of the list; seed: None means file order.

        Raises ValueError for unreadable files or fewer tokens than one sample needs.
        """
        self.label = config.label
        self.tokens = IndexedTokens(config.path)
        self.position, self.seq_len, self.seed, self.vocab_size = position, seq_len, seed, vocab_size
        self.samples_per_epoch = (self.tokens.num_tokens - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"source {self.label} has {self.tokens.num_tokens} tokens, fewer than one sample needs "
                f"(data.seq_len={seq_len}, plus 1); lower data.seq_len or give a larger corpus"
            )
        self._epoch: _Epoch | None = None

    def read(self, n: int, sample_key: int) -> Sample:
        """Sample n of this source, counted over all epochs."""
        number, k = divmod(n, self.samples_per_epoch)
        epoch = self._get_epoch(number)
        start = (k if epoch.samples is None else int(epoch.samples[k])) * self.seq_len
        tokens, ids = self._window(epoch, start, self.seq_len + 1)
        if self.vocab_size is not None and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            wrong = int(tokens.max() if tokens.max() >= self.vocab_size else tokens.min())
            raise ValueError(
                f"{self.tokens.path}.bin holds token {wrong}, but model.vocab_size={self.vocab_size}; the "
                "corpus was made with another tokenizer, or the file is damaged: compare its manifest.json"
            )
        targets = np.where(ids[1:] == ids[:-1], tokens[1:], IGNORE)
        return {
            "tokens": tokens[:-1],
            "targets": targets,
            "document_ids": ids[:-1],
            "sample_keys": sample_key,
        }

    def _get_epoch(self, number: int) -> _Epoch:
        epoch = self._epoch
        if epoch is None or epoch.number != number:
            lengths = self.tokens.lengths
            documents = np.flatnonzero(lengths)
            samples = None
            if self.seed is not None:
                documents = documents[permutation(len(documents), self._key("documents", number))]
                samples = permutation(self.samples_per_epoch, self._key("samples", number))
            starts = np.concatenate([[0], np.cumsum(lengths[documents])])
            epoch = self._epoch = _Epoch(number, documents, starts, samples)
        return epoch

    def _key(self, purpose: str, epoch: int) -> int:
        assert self.seed is not None, "file order has no key"
        return key(self.seed, purpose, self.position, epoch)

    def _window(
        self, epoch: _Epoch, start: int, length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`length` tokens of the epoch's stream from `start` on, and the document of each, counted from 0."""
        tokens, ids = np.empty(length, np.int64), np.empty(length, np.int64)
        first = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        filled, nth = 0, 0
        while filled < length:
            document = self.tokens[int(epoch.documents[first + nth])]
            skipped = start - int(epoch.starts[first]) if nth == 0 else 0
            piece = document[skipped : skipped + length - filled]
            tokens[filled : filled + len(piece)] = piece
            ids[filled : filled + len(piece)] = nth
            filled += len(piece)
            nth += 1
        return tokens, ids


class PackedDataset:
    """Training data: sample(i) for any i >= 0, over as many epochs as it takes.

    A pure function of (the files, weights, seq_len, seed, i). Each source is passed through once per
    epoch of its own. The state of the input is the number of samples consumed, which `consumed` splits
    into the sources' parts.
    """

    batch_size: int | None = None
    threads = 1

    def __init__(
        self, sources: Sequence[SourceConfig], seq_len: int, seed: int, *, vocab_size: int | None = None
    ) -> None:
        """vocab_size: if given, each sample read is checked against it.

        Raises ValueError for unreadable files, a source shorter than a sample, a weight too small to matter.
        """
        self.seq_len, self.seed = seq_len, seed
        self.sources = [
            PackedSource(config, s, seq_len, seed, vocab_size) for s, config in enumerate(sources)
        ]
        self.mixture = Mixture([config.weight for config in sources], [config.label for config in sources])

    def sample(self, i: int) -> Sample:
        """Sample i of the global order. Raises ValueError if it holds a token outside the vocabulary."""
        source, n = self.mixture.locate(i)
        return self.sources[source].read(n, key(self.seed, "sample", i) >> 1)

    def collate(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Samples as a batch: tokens, targets, document_ids (B, T), sample_keys (B,), all int64."""
        return collate(rows)

    def consumed(self, total: int) -> dict[str, int]:
        """Samples of each source among the first `total`."""
        return {source.label: n for source, n in zip(self.sources, self.mixture.consumed(total))}


class SequentialDataset:
    """Validation data: the sources' samples in file order, one source after the other, one pass.

    len() is the number of samples. sample(i) past the end is a row without targets, so that the last
    global batch may be filled up whatever its size: the sum over targets does not depend on it.
    """

    batch_size: int | None = None
    threads = 1

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        seq_len: int,
        *,
        limit: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """limit: use only that many samples, evenly spread over all, and always the same."""
        self.seq_len = seq_len
        self.sources = [
            PackedSource(config, s, seq_len, None, vocab_size) for s, config in enumerate(sources)
        ]
        self._ends = np.cumsum([source.samples_per_epoch for source in self.sources])
        self._all = int(self._ends[-1])
        self._length = self._all if limit is None else min(limit, self._all)

    def __len__(self) -> int:
        return self._length

    def sample(self, i: int) -> Sample:
        """Sample i of the pass; without targets for i >= len()."""
        sample_key = key("validation", i) >> 1
        if i >= self._length:
            empty = np.zeros(self.seq_len, np.int64)
            targets = np.full(self.seq_len, IGNORE, np.int64)
            return {
                "tokens": empty,
                "targets": targets,
                "document_ids": empty.copy(),
                "sample_keys": sample_key,
            }
        place = i * self._all // self._length
        source = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return self.sources[source].read(place - before, sample_key)

    def collate(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """As PackedDataset's."""
        return collate(rows)

    def consumed(self, total: int) -> dict[str, int]:
        """Samples of each source among the first `total` of the pass."""
        places = np.arange(min(total, self._length), dtype=np.int64) * self._all // max(self._length, 1)
        counts = np.bincount(np.searchsorted(self._ends, places, side="right"), minlength=len(self.sources))
        return {source.label: int(count) for source, count in zip(self.sources, counts)}
