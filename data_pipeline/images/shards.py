"""Finding the shards of a source, and reading samples of them at random: one seek and one read each."""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.index import ShardIndex, load_index

log = logging.getLogger("triptych.data_pipeline.images")

_INDEXERS = 8
_OPEN_FILES = 64
_URL = re.compile(r"^(pipe:|[a-z][a-z0-9+.-]*://|file:)", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether a path is a URL or a pipe: of WebDataset."""
    return _URL.match(path) is not None


def expand(path: str) -> list[str]:
    """The paths or URLs that braces stand for, in their order."""
    from braceexpand import braceexpand

    try:
        return list(braceexpand(path))
    except ValueError as error:
        raise ValueError(f"the braces of source {path} do not match; write {{000..123}}") from error


def find_shards(path: str, *, streamed: bool = False) -> list[Path]:
    """The tar files of a source; streamed: they may be compressed.

    Raises ValueError if there is none, or one of those named is missing.
    """
    if is_url(path):
        raise ValueError(
            f"source {path} is a URL; set data.stream: true, or copy its shards to a file system"
        )
    if os.path.isdir(path):
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            raise ValueError(f"source {path} is a directory without .tar files; {_MEND}")
        return shards
    shards = [Path(each) for each in expand(path)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}{more} is missing (source {path}); {_MEND}")
    packed = [shard for shard in shards if shard.suffix != ".tar"]
    if packed and not streamed:
        raise ValueError(
            f"{packed[0]} is no .tar file; shards are read at random, so decompress them, or set "
            "data.stream: true"
        )
    return shards


class _OpenFile:
    """A file for reading, closed when the last thread that uses it lets it go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


_MEND = "name a directory of shards, or write them with `triptych data digits`, `images` or `latents`"


class Shards:
    """The samples of several tar files, numbered through in the order of the files.

    Arrays hold one row per sample: `labels` (N,), `images` (N, 2), `latents` (N, 3), `texts` (N, 2), as in
    ShardIndex. Threads may read together.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Indexes the shards that have no index yet. Raises OSError if one cannot be read."""
        self.paths = list(paths)
        with ThreadPoolExecutor(min(_INDEXERS, len(self.paths)), thread_name_prefix="index") as pool:
            self.indexes: list[ShardIndex] = list(pool.map(load_index, self.paths))
        self._ends = np.cumsum([len(index) for index in self.indexes])
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def faults(self) -> list[tuple[str, str]]:
        """(shard, what is wrong with it)."""
        return [(str(path), fault) for path, index in zip(self.paths, self.indexes) for fault in index.faults]

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,)"""
        return np.concatenate([index.labels for index in self.indexes])

    @cached_property
    def images(self) -> npt.NDArray[np.int32]:
        """(N, 2) height, width."""
        return np.concatenate([index.images for index in self.indexes])

    @cached_property
    def latents(self) -> npt.NDArray[np.int32]:
        """(N, 3) channels, height, width."""
        return np.concatenate([index.latents for index in self.indexes])

    @cached_property
    def texts(self) -> npt.NDArray[np.int32]:
        """(N, 2) tokens, channels."""
        return np.concatenate([index.texts for index in self.indexes])

    def having(self, *suffixes: str) -> npt.NDArray[np.bool_]:
        """(N,) whether a sample has a member of one of these suffixes."""

        def of(index: ShardIndex) -> npt.NDArray[np.bool_]:
            columns = [m for m, suffix in enumerate(index.suffixes) if suffix in suffixes]
            found: npt.NDArray[np.bool_] = np.any(index.offsets[:, columns] >= 0, axis=1)
            return found

        return np.concatenate([of(index) for index in self.indexes])

    def name(self, n: int) -> str:
        """`shard.tar:key`, for messages."""
        shard, s = self._locate(n)
        return f"{self.paths[shard]}:{self.indexes[shard].keys[s].decode('utf-8', 'replace')}"

    def read(self, n: int) -> dict[str, bytes]:
        """The members of sample n by suffix.

        Raises OSError if the file system refuses, RuntimeError if the shard is shorter than when it was
        indexed.
        """
        shard, s = self._locate(n)
        index = self.indexes[shard]
        present = np.flatnonzero(index.offsets[s] >= 0)
        starts, stops = index.offsets[s, present], index.offsets[s, present] + index.sizes[s, present]
        first = int(starts.min())
        data = self._pread(shard, first, int(stops.max()) - first)
        return {
            index.suffixes[m]: data[start - first : stop - first]
            for m, start, stop in zip(present, starts, stops)
        }

    def _locate(self, n: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, n, side="right"))
        return shard, n - (int(self._ends[shard - 1]) if shard else 0)

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._files.pop(shard, None) or _OpenFile(self.paths[shard])
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        # Positional, so threads may share the file; in pieces, as a read may return less than asked for.
        pieces, missing = [], size
        while missing and (piece := os.pread(file.descriptor, missing, offset + size - missing)):
            pieces.append(piece)
            missing -= len(piece)
        if missing:
            raise RuntimeError(
                f"{self.paths[shard]} has become shorter since it was indexed; something writes to it: start "
                "again when the shards are complete"
            )
        return b"".join(pieces)

    # Another process opens the files itself.
    def __getstate__(self) -> list[Path]:
        return self.paths

    def __setstate__(self, paths: list[Path]) -> None:
        self.__init__(paths)  # type: ignore[misc]
