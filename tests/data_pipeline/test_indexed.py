"""Our reader and writer of .bin/.idx against each other, and against damaged files."""

from __future__ import annotations

import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline import IndexedTokens, IndexedWriter, best_dtype

from .conftest import WriteCorpus

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8]]


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=20), min_size=1, max_size=10).filter(any),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_what_is_written_is_read(documents: list[list[int]], dtype: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        with IndexedWriter(f"{directory}/c", dtype) as writer:
            for document in documents:
                writer.add_document(np.asarray(document, dtype=np.int64))
        tokens = IndexedTokens(f"{directory}/c")
        assert [document.tolist() for document in tokens] == documents
        assert len(tokens) == writer.num_documents == len(documents)
        assert tokens.num_tokens == writer.num_tokens == sum(map(len, documents))
        assert tokens.lengths.tolist() == [len(document) for document in documents]
        assert tokens.dtype == np.dtype(dtype)


def test_the_vocabulary_chooses_the_integer_type() -> None:
    assert best_dtype(512) == np.uint16
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32


def test_a_token_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="token 65536 does not fit uint16"),
        IndexedWriter(tmp_path / "c", "uint16") as writer,
    ):
        writer.add_document([65536])
    assert not (tmp_path / "c.idx").exists(), "an index was written for half a corpus"
    with pytest.raises(ValueError, match="hold integers"):
        IndexedWriter(tmp_path / "c", "float32")


def test_documents_past_the_end_are_refused(write_corpus: WriteCorpus) -> None:
    tokens = IndexedTokens(write_corpus(DOCUMENTS))
    assert tokens[3].tolist() == [5, 6, 7, 8]
    with pytest.raises(IndexError, match=r"document 4 of .*, which has 4"):
        tokens[4]


def test_pickled_by_path(write_corpus: WriteCorpus) -> None:
    tokens = IndexedTokens(write_corpus([list(range(10000))]))
    copy = pickle.dumps(tokens)
    assert len(copy) < 500
    assert np.array_equal(pickle.loads(copy).flat, tokens.flat)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("fault", ["missing", "empty"])
def test_missing_and_empty_files_are_named(write_corpus: WriteCorpus, suffix: str, fault: str) -> None:
    path = Path(write_corpus(DOCUMENTS) + suffix)
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"corpus\{suffix} is {fault}; .*point data.sources at a complete corpus"
    ):
        IndexedTokens(path.with_suffix(""))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncation_at_any_byte_is_seen(write_corpus: WriteCorpus, suffix: str) -> None:
    path = Path(write_corpus(DOCUMENTS) + suffix)
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|does not begin with MMIDIDX"):
            IndexedTokens(path.with_suffix(""))
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(ValueError, match="truncated or"):
        IndexedTokens(path.with_suffix(""))


def test_a_flipped_bit_anywhere_in_the_index_is_seen_or_changes_nothing(write_corpus: WriteCorpus) -> None:
    """Every field but the inner document offsets is redundant, and so is the integer type's signedness."""
    path = Path(write_corpus(DOCUMENTS, dtype="int32") + ".idx")
    whole = path.read_bytes()
    expected = [document.tolist() for document in IndexedTokens(path.with_suffix(""))]
    inner_offsets = range(len(whole) - 8 * len(DOCUMENTS), len(whole) - 8)
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                tokens = [document.tolist() for document in IndexedTokens(path.with_suffix(""))]
            except ValueError as error:
                assert str(path.parent) in str(error)
            else:
                assert tokens == expected or place in inner_offsets, f"bit {bit} of byte {place} went unseen"


def test_other_versions_and_types_are_refused(write_corpus: WriteCorpus) -> None:
    path = Path(write_corpus(DOCUMENTS) + ".idx")
    whole = path.read_bytes()
    path.write_bytes(whole[:9] + struct.pack("<Q", 2) + whole[17:])
    with pytest.raises(ValueError, match="format version 2; only version 1"):
        IndexedTokens(path.with_suffix(""))
    for code in (0, 6, 7, 99):
        path.write_bytes(whole[:17] + bytes([code]) + whole[18:])
        with pytest.raises(ValueError, match=f"type code {code}, which is no integer type"):
            IndexedTokens(path.with_suffix(""))
    path.write_bytes(whole + bytes(len(DOCUMENTS)))
    with pytest.raises(ValueError, match="multimodal index"):
        IndexedTokens(path.with_suffix(""))


def test_a_corpus_without_tokens_is_refused(write_corpus: WriteCorpus) -> None:
    path = write_corpus([[], []])
    Path(path + ".bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match="describes no tokens"):
        IndexedTokens(path)
