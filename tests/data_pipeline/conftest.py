"""Small corpora for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from triptych.data_pipeline import IndexedWriter

WriteCorpus = Callable[..., str]


@pytest.fixture
def write_corpus(tmp_path: Path) -> WriteCorpus:
    """`write_corpus(documents, name="corpus", dtype="uint16")` writes token lists, returns the path."""

    def write(documents: Sequence[Sequence[int]], name: str = "corpus", dtype: str = "uint16") -> str:
        path = str(tmp_path / name)
        with IndexedWriter(path, dtype) as writer:
            for document in documents:
                writer.add_document(np.asarray(document, dtype=np.int64))
        return path

    return write
