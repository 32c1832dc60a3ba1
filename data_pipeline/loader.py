"""From the global order to the micro-batches of one rank, read ahead by a thread, resumed exactly.

B micro-batch size, T length of a sample
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypedDict

import numpy as np
import torch

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.dataset import PackedDataset, SequentialDataset


class MicroBatch(TypedDict):
    """What one forward pass takes; all int64."""

    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -100 where there is nothing to predict
    document_ids: torch.Tensor  # (B, T), 0, 1, ... along each row
    sample_keys: torch.Tensor  # (B,), a function of (seed, global sample number)


class BatchLoader:
    """The micro-batches of data-parallel rank `dp_rank`, one list per global batch.

    With `consumed` samples behind, a global batch of G is samples consumed .. consumed + G of the
    dataset; rank r of n takes G/n of them from r*G/n on, in order. Hence the same samples are in the same
    step whatever n is, and `state_dict`, a count, restores on any n. Iteration ends with a
    SequentialDataset and never with a PackedDataset.
    """

    def __init__(
        self,
        dataset: PackedDataset | SequentialDataset,
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

        Raises ValueError if the sizes do not divide.
        """
        per_rank, rest = divmod(global_batch_size, dp_size)
        if rest or per_rank % micro_batch_size or per_rank < 1:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is no multiple of train.micro_batch_size="
                f"{micro_batch_size} times {dp_size} data-parallel ranks; "
                f"use a multiple of {micro_batch_size * dp_size}"
            )
        assert 0 <= dp_rank < dp_size, f"dp_rank {dp_rank} is not in 0..{dp_size - 1}"
        self.dataset = dataset
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.consumed = consumed
        self._offset, self._per_rank = dp_rank * per_rank, per_rank
        self._read_ahead, self._pin_memory = read_ahead, pin_memory
        self._end = len(dataset) if isinstance(dataset, SequentialDataset) else None
        self._pending: deque[Future[list[MicroBatch]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if read_ahead else None

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
        return [
            self._read_micro_batch(range(i, i + self.micro_batch_size))
            for i in range(first, first + self._per_rank, self.micro_batch_size)
        ]

    def _read_micro_batch(self, samples: range) -> MicroBatch:
        rows = [self.dataset.sample(i) for i in samples]

        def tensor(values: Any) -> torch.Tensor:
            made = torch.from_numpy(np.asarray(values, dtype=np.int64))
            return made.pin_memory() if self._pin_memory else made

        return {
            "tokens": tensor([row["tokens"] for row in rows]),
            "targets": tensor([row["targets"] for row in rows]),
            "document_ids": tensor([row["document_ids"] for row in rows]),
            "sample_keys": tensor([row["sample_keys"] for row in rows]),
        }

    def state_dict(self) -> dict[str, Any]:
        """{"total": samples consumed, "consumed": {source: its part}}, not counting what is read ahead."""
        return {"total": self.consumed, "consumed": self.dataset.consumed(self.consumed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the state was taken, on any number of ranks and with any batch size.

        Raises ValueError if the sources or their weights differ from those of the state: with others,
        samples would be repeated and left out. A source may have been moved (a new name in the old place).
        """
        total, saved = int(state["total"]), state["consumed"]
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
        """Ends the thread that reads ahead."""
        if self._thread is not None:
            self._drop_pending()
            self._thread.shutdown(wait=True)

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
