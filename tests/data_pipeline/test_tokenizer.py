"""Byte-level BPE: exact, deterministic, and never fooled by text that quotes its special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline import TextTokenizer, train_tokenizer

TEXTS = ["def f(x):\n    return x\n" * 20, "the cat sat on the mat, the cat sat " * 20, "größer, 日本語"]
TOKENIZER = train_tokenizer(TEXTS, 280)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_is_read_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "x" * 10000 + "<|endoftext|>"])
def test_a_quoted_end_of_document_is_ordinary_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.eod_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_documents_end_with_the_special_token() -> None:
    flat, lengths = TOKENIZER.encode_documents(["the cat", "", "<|endoftext|>"])
    assert lengths.sum() == len(flat)
    assert [flat[end - 1] for end in lengths.cumsum()] == [TOKENIZER.eod_id] * 3
    assert (flat == TOKENIZER.eod_id).sum() == 3
    assert flat[: lengths[0] - 1].tolist() == TOKENIZER.encode("the cat")
    assert TOKENIZER.decode(flat.tolist()) == "the cat<|endoftext|>"
    assert TOKENIZER.decode(flat[: lengths[0]].tolist(), keep_special=True) == "the cat<|endoftext|>"


def test_training_is_deterministic_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOKENIZER.vocab_size == 280 and TOKENIZER.eod_id == 0
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        assert train_tokenizer(TEXTS, 280).digest == TOKENIZER.digest
    assert train_tokenizer(["ab"], 1000).vocab_size == 258
    with pytest.raises(ValueError, match="vocab_size=256 is below 257"):
        train_tokenizer(TEXTS, 256)


def test_the_digest_does_not_depend_on_how_the_json_is_laid_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(json.loads(TOKENIZER.text), indent=8), encoding="utf-8"
    )
    assert TextTokenizer.load(tmp_path).digest == TOKENIZER.digest
    assert train_tokenizer(TEXTS, 281).digest != TOKENIZER.digest


def test_truncation_and_padding_of_a_given_file_do_not_bend_documents() -> None:
    content = json.loads(TOKENIZER.text)
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer = TextTokenizer(json.dumps(content))
    assert tokenizer.encode("a b c d e f") == TOKENIZER.encode("a b c d e f")


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.json cannot be read .*give the path of a tokenizer.json"):
        TextTokenizer.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"broken.json is no tokenizer.json that"):
        TextTokenizer.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"has none of </s> to end a document; name one with eod_token"):
        TextTokenizer(TOKENIZER.text, eod_token="</s>")
    unknown = TextTokenizer(TOKENIZER.text.replace("<|endoftext|>", "<|stop|>"))
    assert unknown.vocab_size == TOKENIZER.vocab_size
    with pytest.raises(ValueError, match=r"none of <\|endoftext\|>, .* name one with eod_token"):
        unknown.encode_documents(["text"])
    assert TextTokenizer(TOKENIZER.text, eod_token="a").eod_id == TOKENIZER.encode("a")[0]
