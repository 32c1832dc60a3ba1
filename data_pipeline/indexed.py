"""Token files in Megatron's .bin/.idx format (MMIDIDX, version 1): a reader over a memory map, and a writer.

`P.bin` holds the tokens of all sequences back to back in one integer type. `P.idx`, little-endian, holds

    9 bytes   "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the integer type (_DTYPES)
    uint64    S, number of sequences
    uint64    D + 1, where D is the number of documents
    int32[S]  tokens of each sequence
    int64[S]  byte at which each sequence starts in P.bin
    int64[D+1] first sequence of each document, and S at the end
    int8[S]   modes, in multimodal files only; these are refused

A test holds both directions against megatron-core's IndexedDataset and IndexedDatasetBuilder.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}

# Sequences checked at a time on opening: bounds the temporary memory for an index of any size.
_BLOCK = 1 << 20


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 when the vocabulary fits, else int32; the bound is Megatron's, so that both agree."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedTokens:
    """The documents of `path`.bin/.idx, memory-mapped.

    len() is the number of documents D, `self[i]` the tokens of document i (a view, 1-D), `flat` all
    tokens in file order, `offsets` (D + 1, int64) where each document starts in `flat`.
    Raises ValueError, with the path and the mend, if a file is missing, empty, truncated or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._open()

    def _open(self) -> None:
        bin_path, idx_path = Path(self.path + ".bin"), Path(self.path + ".idx")
        for file in (idx_path, bin_path):
            if not file.is_file():
                raise ValueError(f"{file} is missing; a corpus is a pair {self.path}.bin and .idx, {_MEND}")
            if file.stat().st_size == 0:
                raise ValueError(f"{file} is empty; {_MEND}")
        self.dtype, num_sequences, num_documents = _read_header(idx_path)
        index = np.memmap(idx_path, dtype=np.uint8, mode="r")
        parts = np.cumsum([_HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * (num_documents + 1)])
        lengths = index[parts[0] : parts[1]].view("<i4")
        pointers = index[parts[1] : parts[2]].view("<i8")
        documents = index[parts[2] : parts[3]].view("<i8")
        num_tokens = _check_index(idx_path, lengths, pointers, documents, self.dtype.itemsize)
        expected = num_tokens * self.dtype.itemsize
        if bin_path.stat().st_size != expected:
            raise ValueError(
                f"{bin_path} has {bin_path.stat().st_size} bytes but {idx_path.name} describes {expected} "
                f"({num_tokens} tokens of {self.dtype}); it is truncated or belongs to another index; {_MEND}"
            )
        self.flat: npt.NDArray[Any] = np.memmap(bin_path, dtype=self.dtype, mode="r")
        starts = np.append(pointers // self.dtype.itemsize, num_tokens)
        self.offsets: npt.NDArray[np.int64] = starts[documents]

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, (D,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> npt.NDArray[Any]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {self.path}, which has {len(self)}")
        return self.flat[self.offsets[document] : self.offsets[document + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self[i] for i in range(len(self)))

    # A memory map pickled by value would carry the corpus along; another process opens the files itself.
    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.path = path
        self._open()


_MEND = "write it again (`triptych data text`) or point data.sources at a complete corpus"


def _read_header(idx_path: Path) -> tuple[np.dtype[Any], int, int]:
    """Integer type, sequences S and documents D, after checking the header and the size of the file."""
    size = idx_path.stat().st_size
    with open(idx_path, "rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise ValueError(f"{idx_path} does not begin with MMIDIDX; it is no Megatron index, {_MEND}")
    if len(header) < _HEADER.size:
        raise ValueError(f"{idx_path} is truncated within its header ({size} bytes); {_MEND}")
    _, version, code, num_sequences, num_offsets = _HEADER.unpack(header)
    if version != 1:
        raise ValueError(f"{idx_path} has format version {version}; only version 1 is known, {_MEND}")
    dtype = np.dtype(_DTYPES.get(code, np.float32))
    if dtype.kind not in "iu":
        raise ValueError(f"{idx_path} has type code {code}, which is no integer type; {_MEND}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_offsets
    if size == expected + num_sequences and num_sequences:
        raise ValueError(f"{idx_path} is a multimodal index (it has modes); text corpora have none")
    if size != expected or num_offsets < 1:
        raise ValueError(
            f"{idx_path} has {size} bytes but its header describes {expected} "
            f"({num_sequences} sequences, {num_offsets} offsets); it is truncated or damaged; {_MEND}"
        )
    return dtype.newbyteorder("<"), num_sequences, num_offsets - 1


def _check_index(
    idx_path: Path,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    itemsize: int,
) -> int:
    """Number of tokens; raises ValueError unless sequences lie back to back and documents are in order."""
    end = 0
    for start in range(0, len(lengths), _BLOCK):
        block = lengths[start : start + _BLOCK].astype(np.int64)
        ends = end + np.cumsum(block) * itemsize
        if (block < 0).any() or not np.array_equal(ends - block * itemsize, pointers[start : start + _BLOCK]):
            raise ValueError(f"{idx_path} is damaged: its lengths and its byte offsets disagree; {_MEND}")
        end = int(ends[-1])
    if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        raise ValueError(
            f"{idx_path} is damaged: its documents do not cover its {len(lengths)} sequences; {_MEND}"
        )
    if end == 0:
        raise ValueError(f"{idx_path} describes no tokens; {_MEND}")
    return end // itemsize


class IndexedWriter:
    """Writes documents to `path`.bin as they come, and `path`.idx on a clean exit of the `with` block.

    Without a clean exit no index is written, so that half a corpus cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.path = os.fspath(path)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES or self.dtype.kind not in "iu":
            raise ValueError(f"token files hold integers; dtype={self.dtype} is none that the format knows")
        self.num_documents = 0
        self.num_tokens = 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._bin = open(self.path + ".bin", "wb")  # noqa: SIM115 - closed in __exit__

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """tokens: 1-D integers, one document."""
        flat = np.asarray(tokens)
        self.add_documents(flat, np.asarray([len(flat)]))

    def add_documents(self, flat: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        """flat: the tokens of several documents back to back, (sum of lengths,); lengths: (documents,)."""
        assert flat.ndim == 1 and int(lengths.sum()) == len(flat), "lengths do not add up to the tokens given"
        limits = np.iinfo(self.dtype)
        if len(flat) and not (limits.min <= flat.min() and flat.max() <= limits.max):
            raise ValueError(
                f"token {flat.max()} does not fit {self.dtype} of {self.path}.bin; use a wider dtype"
            )
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise ValueError(
                f"a document of {lengths.max()} tokens does not fit the format of {self.path}.idx; cut it"
            )
        self._bin.write(flat.astype(self.dtype.newbyteorder("<")).data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self.num_documents += len(lengths)
        self.num_tokens += len(flat)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._bin:
            if kind is None:
                self._bin.flush()
                os.fsync(self._bin.fileno())
        if kind is None:
            self._write_index()

    def _write_index(self) -> None:
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        with open(self.path + ".idx", "wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
