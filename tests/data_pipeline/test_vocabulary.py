"""Tokenizer, corpus and model that disagree on the vocabulary are caught before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from triptych.data_pipeline import DataConfig, TextCorpusOptions, check_vocabulary, train_tokenizer
from triptych.data_pipeline.text import build_text_corpus

from .conftest import WriteCorpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "a.txt").write_text("some words, and some more words\n" * 50)
    options = {"source": str(root / "a.txt"), "out": str(root / "out"), "vocab_size": 270, "workers": 1}
    build_text_corpus(TextCorpusOptions.model_validate(options))
    return root / "out"


def section(*paths: str | Path, tokenizer: Path | None = None) -> DataConfig:
    return DataConfig.model_validate(
        {"sources": [str(path) for path in paths], "seq_len": 4, "tokenizer": tokenizer and str(tokenizer)}
    )


def test_agreement_passes(corpus: Path) -> None:
    for vocab_size in (270, 512):
        check_vocabulary(
            section(corpus / "train", corpus / "valid", tokenizer=corpus / "tokenizer.json"), vocab_size
        )
        check_vocabulary(section(corpus / "train"), vocab_size)


def test_a_model_with_too_small_a_vocabulary(corpus: Path) -> None:
    with pytest.raises(
        ValueError, match=r"with a vocabulary of 270 but model.vocab_size=269; set model.vocab_size"
    ):
        check_vocabulary(section(corpus / "train"), 269)
    with pytest.raises(
        ValueError, match=r"tokenizer.json has 270 ids but model.vocab_size=269; set model.vocab_size"
    ):
        check_vocabulary(section(corpus / "train", tokenizer=corpus / "tokenizer.json"), 269)


def test_another_tokenizer_even_of_the_same_size(corpus: Path, tmp_path: Path) -> None:
    other = train_tokenizer(["entirely other text, of other letters " * 30], 270)
    assert other.vocab_size == 270
    (tmp_path / "tokenizer.json").write_text(other.text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"train was made with another tokenizer .*; use .*out/tokenizer.json"
    ):
        check_vocabulary(section(corpus / "train", tokenizer=tmp_path / "tokenizer.json"), 270)


def test_a_corpus_without_manifest_is_looked_at(write_corpus: WriteCorpus, corpus: Path) -> None:
    path = write_corpus([[1, 2, 299]])
    check_vocabulary(section(path), 300)
    with pytest.raises(
        ValueError, match=r"holds token 299 but model.vocab_size=299; it was made with another"
    ):
        check_vocabulary(section(path), 299)
    with pytest.raises(
        ValueError, match=r"holds token 299 but tokenizer .* has 270; it was made with another"
    ):
        check_vocabulary(section(path, tokenizer=corpus / "tokenizer.json"), 300)
    with pytest.raises(ValueError, match="holds token -1"):
        check_vocabulary(section(write_corpus([[3, -1]], "negative", "int32")), 300)


def test_validation_is_checked_too(corpus: Path, write_corpus: WriteCorpus) -> None:
    config = section(corpus / "train").model_copy(update={"valid": section(write_corpus([[700]])).sources})
    with pytest.raises(ValueError, match="holds token 700"):
        check_vocabulary(config, 300)
