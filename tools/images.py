"""Sample sets as one .npz file, in the form that ADM's evaluation reads, written while they are drawn.

Shape legend: N images, C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# A zip's own headers are some hundred bytes; the file system wants room for itself.
_SPARE_BYTES = 2**20


class NpzWriter:
    """Writes arr_0 (N, ...) in pieces, then arr_1 (N,), the labels, if there are any; uncompressed.

    ADM's sample sets are arr_0 uint8 (N, H, W, C), which `numpy.load` and the published FID evaluations read.
    Use it as a context manager: the file appears under its name when all N are written and on disk, and not
    at all when something is raised within. No more than one piece is in memory.

    shape: of arr_0, N first. Raises OSError (no space left) before the first sample where the disk is too
    small, and when it becomes so; both name what is needed.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, labels: Array | None = None
    ) -> None:
        assert labels is None or labels.shape == shape[:1], f"labels {labels.shape} of {shape[0]} samples"
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.labels = labels
        self.written = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._needed = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize + _SPARE_BYTES

    def __enter__(self) -> NpzWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.path.parent).free < self._needed:
            raise self._too_small()
        # Both are closed by __exit__.
        self._file: IO[bytes] = open(self._temporary, "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._array = self._open_array("arr_0", self.shape, self.dtype)
        return self

    def write(self, pieces: Array) -> None:
        """Append samples (n, ...), of the shape and type that were announced."""
        assert pieces.dtype == self.dtype and pieces.shape[1:] == self.shape[1:], (
            f"{pieces.dtype}{pieces.shape[1:]} in a file of {self.dtype}{self.shape[1:]}"
        )
        assert self.written + len(pieces) <= self.shape[0], f"more than {self.shape[0]} samples"
        try:
            self._array.write(np.ascontiguousarray(pieces).data)
        except OSError as error:
            raise self._named(error) from error
        self.written += len(pieces)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as problem:
            raise self._named(problem) from problem
        finally:
            self._close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert self.written == self.shape[0], f"{self.written} of {self.shape[0]} samples were written"
        self._array.close()
        if self.labels is not None:
            labels = np.ascontiguousarray(self.labels, dtype=np.int64)
            with self._open_array("arr_1", labels.shape, labels.dtype) as array:
                array.write(labels.data)
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._temporary.replace(self.path)

    def _close(self) -> None:
        """Let go of the file, whole or not: closing a zip writes, which a full disk refuses again."""
        for part in (self._array, self._zip, self._file):
            with contextlib.suppress(OSError, ValueError):
                part.close()

    def _open_array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> IO[bytes]:
        array = self._zip.open(f"{name}.npy", "w", force_zip64=True)
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(array, header)
        return array

    def _named(self, error: OSError) -> OSError:
        return self._too_small() if error.errno == errno.ENOSPC else error

    def _too_small(self) -> OSError:
        free = shutil.disk_usage(self.path.parent).free
        return OSError(
            errno.ENOSPC,
            f"no space left: {self.shape[0]} samples need {self._needed / 2**20:,.0f} MiB and "
            f"{free / 2**20:,.0f} MiB are free; give another --out or a smaller --num",
            str(self.path),
        )
