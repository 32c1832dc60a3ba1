"""The bigram baseline against a dictionary that is obviously right."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from triptych.data_pipeline import (
    IGNORE,
    DataConfig,
    IndexedTokens,
    SequentialDataset,
    bigram_baseline,
    fit_bigram,
)

from .conftest import WriteCorpus

V = 13


def markov(documents: int, seed: int, length: int = 40) -> list[list[int]]:
    """Documents of a chain in which a token is often followed by the next."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(documents):
        tokens = [int(draw.integers(V))]
        while len(tokens) < draw.integers(2, length):
            tokens.append((tokens[-1] + 1) % V if draw.random() < 0.6 else int(draw.integers(V)))
        made.append(tokens)
    return made


def brute_force_probability(
    documents: list[list[int]], weights: tuple[float, float, float], a: int, t: int
) -> float:
    pairs = Counter((x, y) for document in documents for x, y in pairwise(document))
    contexts, targets = Counter[int](), Counter[int]()
    for (x, y), count in pairs.items():
        contexts[x] += count
        targets[y] += count
    unigram = targets[t] / sum(targets.values())
    bigram = pairs[a, t] / contexts[a] if contexts[a] else unigram
    return weights[0] * bigram + weights[1] * unigram + weights[2] / V


@pytest.mark.parametrize("documents", [100, 5], ids=["held out by document", "held out by block"])
def test_against_a_dictionary(write_corpus: WriteCorpus, documents: int) -> None:
    """Probabilities of all pairs, and the cross-entropy over the targets of the validation samples."""
    train, valid = markov(documents, seed=0), markov(8, seed=1)
    model = fit_bigram([IndexedTokens(write_corpus(train, "train"))], V + 1)
    weights = tuple(model.weights.tolist())
    assert math.isclose(sum(weights), 1) and min(weights) > 0
    a, t = np.divmod(np.arange(V * V), V)
    p = model.probability(a, t)
    for context, target, value in zip(a.tolist(), t.tolist(), p.tolist()):
        # The model has one token more than the chain, so its uniform part is smaller.
        expected = brute_force_probability(
            train, (weights[0], weights[1], weights[2] * V / (V + 1)), context, target
        )
        assert math.isclose(value, expected, rel_tol=1e-12), f"p({target} | {context})"

    dataset = SequentialDataset(
        DataConfig.model_validate({"sources": [write_corpus(valid, "valid")], "seq_len": 7}).sources, 7
    )
    total, count = 0.0, 0
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        for context, target in zip(sample["tokens"].tolist(), sample["targets"].tolist()):
            if target != IGNORE:
                total -= math.log(model.probability(np.asarray([context]), np.asarray([target]))[0])
                count += 1
    nats, targets = model.cross_entropy(dataset)
    assert targets == count
    assert math.isclose(nats, total / count, rel_tol=1e-12)


def test_probabilities_sum_to_one_even_for_a_context_never_seen(write_corpus: WriteCorpus) -> None:
    model = fit_bigram([IndexedTokens(write_corpus(markov(60, seed=2)))], V + 5)
    for context in (0, V + 4):
        p = model.probability(np.full(V + 5, context), np.arange(V + 5))
        assert math.isclose(p.sum(), 1, rel_tol=1e-12)


def test_the_weights_are_best_on_what_was_held_out(write_corpus: WriteCorpus) -> None:
    """EM's maximum against a grid, on the pairs of every 20th document, counting the others."""
    train = markov(400, seed=3, length=12)
    model = fit_bigram([IndexedTokens(write_corpus(train))], V)
    kept = [document for i, document in enumerate(train) if i % 20 != 19]
    held = [pair for document in train[19::20] for pair in pairwise(document)]
    terms = np.asarray(
        [[brute_force_probability(kept, tuple(unit), a, t) for unit in np.eye(3)] for a, t in held]
    )

    def loss(weights: np.ndarray) -> float:
        return float(-np.log(terms @ weights).mean())

    fitted = loss(model.weights)
    grid = [
        np.asarray([x, y, 1 - x - y]) for x in np.arange(0.01, 1, 0.02) for y in np.arange(0.01, 1 - x, 0.02)
    ]
    assert fitted <= min(map(loss, grid)) + 1e-9
    assert model.weights[0] > 0.5, "the chain is mostly a bigram's work"


def test_pairs_across_documents_do_not_count(write_corpus: WriteCorpus) -> None:
    documents = [[0, 1], [2, 3]] * 50
    model = fit_bigram([IndexedTokens(write_corpus(documents))], 4)
    assert model.pairs.counts.sum() == len(documents)
    assert model.pairs.of(np.asarray([1 * 4 + 2, 0 * 4 + 1])).tolist() == [0, 50]


def test_blocks_do_not_change_the_counts(write_corpus: WriteCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = IndexedTokens(write_corpus(markov(100, seed=4)))
    whole = fit_bigram([corpus], V)
    monkeypatch.setattr("triptych.data_pipeline.baseline._BLOCK", 7)
    pieces = fit_bigram([corpus], V)
    assert pieces.pairs.keys.tolist() == whole.pairs.keys.tolist()
    assert pieces.pairs.counts.tolist() == whole.pairs.counts.tolist()
    assert pieces.weights.tolist() == whole.weights.tolist()


def test_report_of_a_section(write_corpus: WriteCorpus) -> None:
    train, valid = write_corpus(markov(100, seed=5), "train"), write_corpus(markov(30, seed=6), "valid")
    config = DataConfig.model_validate({"sources": [train], "valid": [valid], "seq_len": 8})
    report = bigram_baseline(config, V, SequentialDataset(config.sources, 8))
    assert 0.9 < report.nats_per_token < math.log(V)
    assert report.train_pairs == IndexedTokens(train).num_tokens - 100
    assert f"{report.nats_per_token:.4f} nats/token on {report.num_targets}" in report.summary()


def test_too_little_and_wrong_input_is_refused(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too short to fit a bigram"):
        fit_bigram([IndexedTokens(write_corpus([[1, 2]]))], 4)
    with pytest.raises(ValueError, match=r"holds tokens 1..9, not all below model.vocab_size=4"):
        fit_bigram([IndexedTokens(write_corpus([[1, 9]] * 50))], 4)
    model = fit_bigram([IndexedTokens(write_corpus([[1, 2, 3]] * 50))], 4)
    alone = DataConfig.model_validate({"sources": [write_corpus([[1], [2], [3]], "alone")], "seq_len": 2})
    with pytest.raises(ValueError, match="hold no target"):
        model.cross_entropy(SequentialDataset(alone.sources, 2))
