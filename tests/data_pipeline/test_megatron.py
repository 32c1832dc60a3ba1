"""Our token files against megatron-core's reader and writer, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triptych.data_pipeline import IndexedTokens, IndexedWriter, best_dtype

from .conftest import WriteCorpus

DOCUMENTS = [[7, 1, 2, 3], [4], [5, 6, 511, 0, 9], [3, 3]]


@pytest.fixture(scope="module")
def megatron() -> Any:
    # Some 8 s of imports: once for the module, and nowhere else in the suite of this room.
    return pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed (extra `megatron`)"
    )


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_ours(megatron: Any, write_corpus: WriteCorpus, dtype: str) -> None:
    theirs = megatron.IndexedDataset(write_corpus(DOCUMENTS, dtype=dtype))
    assert len(theirs) == len(DOCUMENTS)
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs[0].dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_megatrons(megatron: Any, tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    """Also documents of several sequences, and documents without any."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=dtype)
    for document in DOCUMENTS:
        for piece in (document[:1], document[1:]):
            builder.add_item(torch.tensor(piece))
        builder.end_document()
    builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    ours = IndexedTokens(tmp_path / "c")
    assert [document.tolist() for document in ours] == [*DOCUMENTS, []]
    assert ours.dtype == np.dtype(dtype)


def test_both_write_the_same_bytes(megatron: Any, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with IndexedWriter(tmp_path / "ours", "uint16") as writer:
        for document in DOCUMENTS:
            builder.add_document(np.asarray(document), [len(document)])
            writer.add_document(document)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_both_choose_the_same_integer_type(megatron: Any) -> None:
    for vocab_size in (1, 512, 65499, 65500, 65536, 128000):
        assert best_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)
