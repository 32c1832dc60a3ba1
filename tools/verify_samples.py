"""The batches on which `verify` compares layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from triptych.data_pipeline.loader import BatchLoader, open_training

if TYPE_CHECKING:
    from triptych.training.sections import RunSections


def synthetic_samples(run: RunSections, count: int) -> dict[str, Tensor]:
    """`count` samples of random tokens, each row of two or three documents (one in a row of fewer than 4
    tokens).

    tokens, targets, document_ids: int64 (count, T); sample_keys: int64 (count,). The last token of a document
    has no target (-100).
    """
    size_t, draw = run.data.seq_len, torch.Generator().manual_seed(run.train.seed)
    tokens = torch.randint(run.model.vocab_size, (count, size_t), generator=draw)
    document_ids = torch.zeros_like(tokens)
    if size_t >= 4:
        cuts = torch.randint(1, size_t, (count, 2), generator=draw)
        places = torch.arange(size_t)
        document_ids = (places >= cuts[:, :1]).long() + (places >= cuts[:, 1:]).long()
    targets = torch.full_like(tokens, -100)
    same = document_ids[:, 1:] == document_ids[:, :-1]
    targets[:, :-1] = torch.where(same, tokens[:, 1:], -100)
    sample_keys = torch.randint(2**62, (count,), generator=draw)
    return {"tokens": tokens, "targets": targets, "document_ids": document_ids, "sample_keys": sample_keys}


def corpus_samples(run: RunSections, count: int) -> dict[str, Tensor]:
    """The first `count` samples of the run's own data, in its global order; shapes as in `synthetic_samples`.

    Raises ValueError when a corpus of `data.sources` cannot be read.
    """
    config, train = run.data, run.train
    try:
        dataset = open_training(config, train.seed, run.model.vocab_size)
    except ValueError as error:
        raise ValueError(f"{error}; or give --synthetic to verify on random tokens") from error
    with BatchLoader(dataset, count, count, read_ahead=0) as loader:
        (samples,) = next(loader)
    return {
        "tokens": samples["tokens"],
        "targets": samples["targets"],
        "document_ids": samples["document_ids"],
        "sample_keys": samples["sample_keys"],
    }
