"""The number a language model has to beat: the cross-entropy of an interpolated bigram model.

    p(t | a) = w2 * c(a, t) / c(a) + w1 * c(t) / N + w0 / V

with counts over the pairs (a, t) of neighbouring tokens of one document, c(t) = sum_a c(a, t), and the
bigram term replaced by the unigram's where c(a) = 0, so that p always sums to 1. The weights are those
of deleted interpolation (Jelinek & Mercer, 1980): fitted by EM on pairs held out of the training split
while the counts are of the rest; then the counts are taken over the whole training split.

V vocabulary, N pairs of the training split
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.dataset import IGNORE, SequentialDataset
from triptych.data_pipeline.indexed import IndexedTokens

# Pairs counted at a time: bounds the memory for a corpus of any size.
_BLOCK = 1 << 22
# One group of documents (or, with few documents, of tokens) in this many is held out for the weights.
_HOLD_OUT_EVERY = 20


def _weighted(
    values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], length: int
) -> npt.NDArray[np.float64]:
    return np.bincount(values, counts, minlength=length).astype(np.float64)


class _PairCounts:
    """How often each pair of tokens was seen: sorted keys a * V + t and their counts."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.keys: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def add(self, keys: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        """keys: distinct and sorted."""
        merged, place = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, place, np.concatenate([self.counts, counts]))
        self.keys, self.counts = merged, total

    def of(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Counts of any keys, 0 for a pair not seen."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)

    def contexts(self) -> npt.NDArray[np.float64]:
        """c(a), (V,)."""
        return _weighted(self.keys // self.vocab_size, self.counts, self.vocab_size)

    def targets(self) -> npt.NDArray[np.float64]:
        """c(t), (V,)."""
        return _weighted(self.keys % self.vocab_size, self.counts, self.vocab_size)


@dataclass(frozen=True)
class Bigram:
    """A fitted model."""

    pairs: _PairCounts
    contexts: npt.NDArray[np.float64]  # (V,)
    unigram: npt.NDArray[np.float64]  # (V,)
    weights: npt.NDArray[np.float64]  # (3,) of bigram, unigram and uniform

    def probability(
        self, contexts: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """p(target | context) for arrays of pairs."""
        return self.weights @ _terms(self.pairs, self.contexts, self.unigram, contexts, targets)

    def cross_entropy(self, dataset: SequentialDataset) -> tuple[float, int]:
        """Mean nats per target, and the number of targets, over just the pairs that evaluation uses."""
        total, count = 0.0, 0
        for i in range(len(dataset)):
            sample = dataset.sample(i)
            known = sample["targets"] != IGNORE
            p = self.probability(sample["tokens"][known], sample["targets"][known])
            total -= float(np.log(p).sum())
            count += int(known.sum())
        if not count:
            raise ValueError(
                "the validation samples hold no target; give a longer validation corpus (data.valid)"
            )
        return total / count, count


@dataclass(frozen=True)
class BaselineReport:
    """Cross-entropy of the bigram model on the validation targets."""

    nats_per_token: float
    num_targets: int
    train_pairs: int
    weights: tuple[float, float, float]
    """Of bigram, unigram and uniform."""

    def summary(self) -> str:
        bigram, unigram, uniform = self.weights
        return (
            f"interpolated bigram: {self.nats_per_token:.4f} nats/token on {self.num_targets} validation "
            f"targets (fitted on {self.train_pairs} pairs; weights {bigram:.4f} bigram, "
            f"{unigram:.4f} unigram, {uniform:.1e} uniform)"
        )


def bigram_baseline(config: DataConfig, vocab_size: int, validation: SequentialDataset) -> BaselineReport:
    """Fits on all of data.sources (each token once, whatever the weights) and measures on `validation`."""
    model = fit_bigram([IndexedTokens(source.path) for source in config.sources], vocab_size)
    nats, count = model.cross_entropy(validation)
    bigram, unigram, uniform = map(float, model.weights)
    return BaselineReport(nats, count, int(model.pairs.counts.sum()), (bigram, unigram, uniform))


def fit_bigram(corpora: Sequence[IndexedTokens], vocab_size: int) -> Bigram:
    """Raises ValueError if a token is outside the vocabulary, or there is too little to fit on."""
    kept, held_out = _PairCounts(vocab_size), _PairCounts(vocab_size)
    for corpus in corpora:
        for keys, held in _pair_keys(corpus, vocab_size):
            kept.add(*np.unique(keys[~held], return_counts=True))
            held_out.add(*np.unique(keys[held], return_counts=True))
    if not kept.counts.sum() or not held_out.counts.sum():
        raise ValueError("the training corpora are too short to fit a bigram model; give at least 100 tokens")
    weights = _fit_weights(kept, held_out)
    kept.add(held_out.keys, held_out.counts)
    targets = kept.targets()
    return Bigram(kept, kept.contexts(), targets / targets.sum(), weights)


def _pair_keys(
    corpus: IndexedTokens, vocab_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """a * V + t of the pairs within documents, in blocks, and which of them are held out."""
    # Whole documents are held out where there are enough, for a document resembles itself.
    by_document = len(corpus) >= 2 * _HOLD_OUT_EVERY
    group = max(2, corpus.num_tokens // (10 * _HOLD_OUT_EVERY))
    for start in range(0, corpus.num_tokens - 1, _BLOCK):
        tokens = corpus.flat[start : start + _BLOCK + 1].astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(
                f"corpus {corpus.path} holds tokens {tokens.min()}..{tokens.max()}, not all below "
                f"model.vocab_size={vocab_size}; it was made with another tokenizer"
            )
        position = np.arange(start, start + len(tokens))
        document = np.searchsorted(corpus.offsets, position, side="right") - 1
        within = document[1:] == document[:-1]
        unit = document if by_document else position // group
        held = unit[:-1] % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1
        keys = tokens[:-1] * vocab_size + tokens[1:]
        yield keys[within], held[within]


def _terms(
    pairs: _PairCounts,
    contexts: npt.NDArray[np.float64],
    unigram: npt.NDArray[np.float64],
    a: npt.NDArray[np.int64],
    t: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """The three estimates of p(t | a), (3, pairs): bigram, unigram, uniform."""
    seen = contexts[a]
    bigram = np.where(seen > 0, pairs.of(a * pairs.vocab_size + t) / np.maximum(seen, 1), unigram[t])
    return np.stack([bigram, unigram[t], np.full(len(t), 1 / pairs.vocab_size)])


def _fit_weights(kept: _PairCounts, held_out: _PairCounts) -> npt.NDArray[np.float64]:
    """EM for the mixture weights on the held-out pairs: each step sets them to the mean responsibilities."""
    targets = kept.targets()
    a, t = held_out.keys // kept.vocab_size, held_out.keys % kept.vocab_size
    terms = _terms(kept, kept.contexts(), targets / targets.sum(), a, t)
    share = held_out.counts / held_out.counts.sum()
    weights = np.full(3, 1 / 3)
    for _ in range(500):
        joint = weights[:, None] * terms
        updated = (joint / joint.sum(0)) @ share
        converged = np.abs(updated - weights).max() < 1e-10
        weights = updated
        if converged:
            break
    # A weight of exactly 0 would give log 0 to a pair that only validation holds.
    weights = np.maximum(weights, 1e-9)
    return weights / weights.sum()
