"""From the global order to the micro-batches of one rank, read ahead by a thread, resumed exactly.

Text and images alike: what a sample is and how samples become tensors is the dataset's matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.dataset import PackedDataset, SequentialDataset

MicroBatch = dict[str, torch.Tensor]
"""What one forward pass takes, by name, the samples along the first dimension.

Text, all int64: tokens, targets (B, T; -100 where there is nothing to predict), document_ids (B, T; 0, 1, ...
along each row), sample_keys (B,; a function of (seed, global sample number)). Images: see `images.dataset`.
"""


class Dataset(Protocol):
    """Samples by number. One that ends has a len()."""

    @property
    def batch_size(self) -> int | None:
        """The global batch that the order is made for; None: any."""
        ...

    @property
    def threads(self) -> int:
        """Threads that may read samples at the same time."""
        ...

    def sample(self, i: int) -> Any:
        """Sample i of the global order, a pure function of i."""
        ...

    def collate(self, rows: Any) -> MicroBatch:
        """Samples as one micro-batch."""
        ...

    def consumed(self, total: int) -> dict[str, int]:
        """Samples of each source among the first `total`."""
        ...


class RankReader(Protocol):
    """What one data rank reads of data that is no function of the sample's number."""

    def sample(self, i: int) -> Any:
        """The next sample, to stand at place i of the global order; asked for in rising order."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """Data without a global order, of which each data rank reads a part (`images.streaming`)."""

    batch_size: int | None
    threads: int

    def for_rank(self, dp_rank: int, dp_size: int, global_batch_size: int) -> RankReader:
        """What a data rank reads."""
        ...

    def collate(self, rows: Any) -> MicroBatch:
        """Samples as one micro-batch."""
        ...

    def consumed(self, total: int) -> dict[str, int]:
        """Samples of each source among the first `total`, about."""
        ...


class BatchLoader:
    """The micro-batches of data-parallel rank `dp_rank`, one list per global batch.

    With `consumed` samples behind, a global batch of G is samples consumed .. consumed + G of the
    dataset; rank r of n takes G/n of them from r*G/n on, in order. Hence the same samples are in the same
    step whatever n is, and `state_dict`, a count, restores on any n. Iteration ends with a dataset that
    has a len() and never with another. Streamed data is the exception; it says itself what holds for it.
    """

    def __init__(
        self,
        dataset: Dataset | Streamed,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed: int = 0,
        *,
        read_ahead: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """read_ahead: global batches prepared in advance, 0 for none.

        Raises ValueError if the sizes do not divide, or the dataset's order is made for another global batch.
        """
        per_rank, rest = divmod(global_batch_size, dp_size)
        if rest or per_rank % micro_batch_size or per_rank < 1:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is no multiple of train.micro_batch_size="
                f"{micro_batch_size} times {dp_size} data-parallel ranks; "
                f"use a multiple of {micro_batch_size * dp_size}"
            )
        if dataset.batch_size not in (None, global_batch_size) or (
            dataset.batch_size and consumed % global_batch_size
        ):
            raise ValueError(
                f"the order of the data is made for global batches of {dataset.batch_size} (data.buckets), "
                f"and {global_batch_size} are to be read from sample {consumed} on; open it with that size"
            )
        assert 0 <= dp_rank < dp_size, f"dp_rank {dp_rank} is not in 0..{dp_size - 1}"
        self.dataset = dataset
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.consumed = consumed
        self._offset, self._per_rank = dp_rank * per_rank, per_rank
        self._read_ahead, self._pin_memory = read_ahead, pin_memory
        self._end = len(dataset) if isinstance(dataset, Sized) else None
        self._pending: deque[Future[list[MicroBatch]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if read_ahead else None
        self._reader: Dataset | RankReader = (
            dataset.for_rank(dp_rank, dp_size, global_batch_size)
            if isinstance(dataset, Streamed)
            else dataset
        )
        threads = dataset.threads
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="samples") if threads > 1 else None

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        """The micro-batches of the next global batch; raises what reading it raised."""
        if self._end is not None and self.consumed >= self._end:
            raise StopIteration
        if self._thread is None:
            batch = self._read(self.consumed)
        else:
            while len(self._pending) <= self._read_ahead:
                ahead = self.consumed + len(self._pending) * self.global_batch_size
                self._pending.append(self._thread.submit(self._read, ahead))
            try:
                batch = self._pending.popleft().result()
            except BaseException:
                # What is pending is for later batches; a caller that goes on asks for this one again.
                self._drop_pending()
                raise
        self.consumed += self.global_batch_size
        return batch

    def _read(self, consumed: int) -> list[MicroBatch]:
        first = consumed + self._offset
        numbers = range(first, first + self._per_rank)
        read = self._reader.sample
        rows = list(self._decoders.map(read, numbers) if self._decoders else map(read, numbers))
        return [
            self._collate(rows[i : i + self.micro_batch_size])
            for i in range(0, self._per_rank, self.micro_batch_size)
        ]

    def _collate(self, rows: list[Any]) -> MicroBatch:
        batch = self.dataset.collate(rows)
        return {name: value.pin_memory() for name, value in batch.items()} if self._pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """{"total": samples consumed, "consumed": {source: its part}}, not counting what is read ahead.

        With an order made for one global batch size also "batch_size".
        """
        state = {"total": self.consumed, "consumed": self.dataset.consumed(self.consumed)}
        return state if self.dataset.batch_size is None else state | {"batch_size": self.dataset.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the state was taken, on any number of ranks and with any batch size.

        Raises ValueError if the sources or their weights differ from those of the state: with others,
        samples would be repeated and left out. A source may have been moved (a new name in the old place).
        So it does if the order was made for another global batch size.
        """
        total, saved = int(state["total"]), state["consumed"]
        if state.get("batch_size") != self.dataset.batch_size:
            raise ValueError(
                "the checkpoint's order of the data was made for global batches of "
                f"{state.get('batch_size')}, this one's for {self.dataset.batch_size} (None: any); with "
                "data.buckets train.global_batch_size must stay, and so must data.buckets"
            )
        expected = self.dataset.consumed(total)
        if not _same_sources(saved, expected):
            raise ValueError(
                f"the checkpoint had consumed {saved} of data.sources, which by the present names and "
                f"weights would be {expected}; restore data.sources, or start a new run"
            )
        self._drop_pending()
        self.consumed = total

    def _drop_pending(self) -> None:
        for pending in self._pending:
            pending.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Ends the threads that read ahead."""
        if self._thread is not None:
            self._drop_pending()
            self._thread.shutdown(wait=True)
        if self._decoders is not None:
            self._decoders.shutdown(wait=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _same_sources(saved: dict[str, int], expected: dict[str, int]) -> bool:
    """Equal counts place by place, and no name that both know in another place."""
    return list(saved.values()) == list(expected.values()) and all(
        before == now or (before not in expected and now not in saved) for before, now in zip(saved, expected)
    )


def open_training(config: DataConfig, seed: int, vocab_size: int | None = None) -> PackedDataset:
    """The training data of section `data:`; seed: train.seed, used where data.seed is None."""
    chosen = seed if config.seed is None else config.seed
    return PackedDataset(config.sources, config.seq_len, chosen, vocab_size=vocab_size)


def open_validation(
    config: DataConfig, *, limit: int | None = None, vocab_size: int | None = None
) -> SequentialDataset | None:
    """The validation data of section `data:`, None if it names none; limit: the most samples to use."""
    if not config.valid:
        return None
    return SequentialDataset(config.valid, config.seq_len, limit=limit, vocab_size=vocab_size)
