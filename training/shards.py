"""Sharded tensors on disk: safetensors files and an index from each tensor's name to its chunks.

A chunk is the window of a whole tensor that one rank held: `offset` is the window's first index in each
dimension, `shape` its size. A reader asks for windows of its own, so any layout reads any other's files. The
container is the safetensors format: an 8-byte little-endian header length, a JSON header, raw bytes. It is
written here rather than by the library so that a full disk stays an OSError and the checksum is taken from
the bytes on their way out; it is read with the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_COPY_BYTES = 64 * 2**20


class Shard(Protocol):
    """What one rank holds of a named tensor (parallel.ShardInfo is one)."""

    @property
    def name(self) -> str:
        """Name in the whole model."""

    @property
    def tensor(self) -> Tensor:
        """The window's values; shares storage with what it describes."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    def offset(self) -> tuple[int, ...]:
        """First index of the window in each dimension."""

    @property
    def is_writer(self) -> bool:
        """Whether this rank saves it; exactly one rank saves each element."""


@dataclass(frozen=True)
class Window:
    """A Shard without a model around it: optimizer states, tests."""

    name: str
    tensor: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    is_writer: bool = True


@dataclass(frozen=True)
class Chunk:
    """One window on disk."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One whole tensor on disk."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


Index = dict[str, Entry]


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write CPU tensors as one safetensors file, flush it to disk and return its SHA-256.

    Raises OSError as the file system does; a partly written file is left for the caller to remove.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # The format wants each value aligned to its type: widest types first keeps that without gaps.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        _put(file, digest, len(encoded).to_bytes(8, "little"))
        _put(file, digest, encoded)
        for name in names:
            flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, flat.numel(), _COPY_BYTES):
                _put(file, digest, flat[start : start + _COPY_BYTES].numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _put(file: BinaryIO, digest: Any, data: bytes | memoryview) -> None:
    file.write(data)
    digest.update(data)


def part_index(file: str, shards: Iterable[Shard]) -> Index:
    """The index of one rank's file: the chunks of the shards that this rank writes."""
    index: Index = {}
    for shard in shards:
        shape, offset = tuple(shard.tensor.shape), tuple(shard.offset)
        assert shard.name not in index, f"rank holds two windows of {shard.name}"
        assert len(shape) == len(offset) == len(shard.global_shape), f"{shard.name}: ranks of shapes differ"
        chunk = Chunk(file=file, key=shard.name, offset=offset, shape=shape)
        index[shard.name] = Entry(tuple(shard.global_shape), _DTYPES[shard.tensor.dtype], (chunk,))
    return index


def merge(parts: Iterable[Index]) -> Index:
    """One index from the ranks' own; every tensor must be covered by its chunks exactly once."""
    merged: Index = {}
    for part in parts:
        for name, entry in part.items():
            known = merged.get(name)
            if known is None:
                merged[name] = entry
                continue
            assert (known.shape, known.dtype) == (entry.shape, entry.dtype), (
                f"{name} is {known.dtype}{known.shape} on one rank and {entry.dtype}{entry.shape} on another"
            )
            merged[name] = Entry(known.shape, known.dtype, known.chunks + entry.chunks)
    for name, entry in merged.items():
        covered = sum(math.prod(chunk.shape) for chunk in entry.chunks)
        assert covered == math.prod(entry.shape), (
            f"{name} of shape {entry.shape} was saved with {covered} of {math.prod(entry.shape)} elements: "
            "each must have exactly one writer"
        )
    return merged


def index_to_json(index: Index) -> dict[str, Any]:
    """The index as JSON values; `index_from_json` is its inverse."""
    return {name: asdict(entry) for name, entry in index.items()}


def index_from_json(data: Mapping[str, Any]) -> Index:
    """The index that `index_to_json` wrote."""
    return {
        name: Entry(
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            chunks=tuple(
                Chunk(chunk["file"], chunk["key"], tuple(chunk["offset"]), tuple(chunk["shape"]))
                for chunk in entry["chunks"]
            ),
        )
        for name, entry in data.items()
    }


class Reader:
    """Reads windows of the tensors in one directory; opens each file once, reads overlapping slices only."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory = directory
        self.index = index
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @torch.no_grad()
    def read_into(self, shard: Shard) -> None:
        """Fill `shard.tensor` in place, casting to its dtype.

        Raises ValueError where the checkpoint has no such tensor, or one of another shape.
        """
        entry = self.index.get(shard.name)
        if entry is None:
            raise ValueError(f"checkpoint {self.directory} has no tensor {shard.name}")
        if entry.shape != tuple(shard.global_shape):
            raise ValueError(
                f"checkpoint {self.directory}: {shard.name} has shape {entry.shape}, "
                f"the model wants {tuple(shard.global_shape)}"
            )
        local = shard.tensor.detach()
        filled = 0
        for chunk in entry.chunks:
            overlap = _overlap(chunk, tuple(shard.offset), tuple(local.shape))
            if overlap is None:
                continue
            source, target = overlap
            values = self._slice(chunk, source)
            local[target].copy_(values)
            filled += values.numel()
        assert filled == local.numel(), (
            f"{shard.name}: the chunks filled {filled} of {local.numel()} elements"
        )

    def _slice(self, chunk: Chunk, source: tuple[slice, ...]) -> Tensor:
        file = self._files.get(chunk.file)
        if file is None:
            path = self.directory / chunk.file
            file = self._stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            self._files[chunk.file] = file
        return file.get_slice(chunk.key)[source] if source else file.get_tensor(chunk.key)


def _overlap(
    chunk: Chunk, offset: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Slices of the chunk and of the window that hold the same elements, None where none do."""
    source, target = [], []
    for chunk_start, chunk_size, start, size in zip(chunk.offset, chunk.shape, offset, shape, strict=True):
        low, high = max(chunk_start, start), min(chunk_start + chunk_size, start + size)
        if low >= high:
            return None
        source.append(slice(low - chunk_start, high - chunk_start))
        target.append(slice(low - start, high - start))
    return tuple(source), tuple(target)
