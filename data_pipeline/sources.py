"""Where a text corpus comes from: finding the files, cutting them into units of work, reading documents.

A unit is what one process reads and tokenizes at a time, about _UNIT_BYTES: some small text files, a
byte range of a JSONL file, or row groups of a Parquet file. Units are a function of the files alone,
so a corpus does not depend on how many processes built it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STDLIB = "stdlib"
_UNIT_BYTES = 1 << 19
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class InputFile:
    """A file to read: where it is, and its name in reports (relative to what the user gave)."""

    path: str
    name: str
    size: int
    changed: int
    """Time of the last change, ns."""

    @property
    def kind(self) -> str:
        suffix = os.path.splitext(self.path)[1].lower()
        return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix, "text")


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time."""

    kind: str
    files: tuple[InputFile, ...]
    start: int
    """JSONL: first byte. Parquet: first row group."""
    stop: int
    size: int
    """Bytes of input, for progress."""


@dataclass
class Documents:
    """What a unit held."""

    texts: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    """Name and reason of each input left out."""
    empty: int = 0

    def add(self, text: str, name: str) -> None:
        if not text:
            self.empty += 1
            return
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, which is no text
            self.bad.append(f"{name}: not valid Unicode ({error.reason})")
            return
        self.texts.append(text)


def find_files(sources: tuple[str, ...], extensions: tuple[str, ...]) -> list[InputFile]:
    """All input files, each directory's in order of name. Raises ValueError for a source that gives none."""
    files: list[InputFile] = []
    for source in sources:
        if source == STDLIB:
            found = _walk(sysconfig.get_paths()["stdlib"], (".py",))
            if not found:
                raise RuntimeError(
                    "this Python has no standard library sources on disk; give files instead of stdlib"
                )
        elif os.path.isdir(source):
            found = _walk(source, extensions)
            if not found:
                raise ValueError(
                    f"source {source} holds no file ending in {', '.join(extensions)}; see extensions"
                )
        elif os.path.isfile(source):
            found = [_input_file(source, os.path.basename(source))]
        else:
            raise ValueError(f"source {source} does not exist; give {STDLIB!r}, a file or a directory")
        files += found
    paths = [os.path.realpath(file.path) for file in files]
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice} is reached from two sources ({', '.join(sources)}); name it once")
    return files


def _walk(root: str, extensions: tuple[str, ...]) -> list[InputFile]:
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name.lower().endswith(extensions) and os.path.isfile(path):
                found.append(_input_file(path, os.path.relpath(path, root)))
    return found


def _input_file(path: str, name: str) -> InputFile:
    status = os.stat(path)
    return InputFile(path, name, status.st_size, status.st_mtime_ns)


def look_again(files: list[InputFile]) -> list[InputFile]:
    """The same files with the size and time of change they have now; one that is gone has size -1."""
    now = []
    for file in files:
        try:
            now.append(_input_file(file.path, file.name))
        except OSError:
            now.append(InputFile(file.path, file.name, -1, 0))
    return now


def inputs_digest(files: list[InputFile]) -> str:
    """SHA-256 over name, size and time of change: equal when no input file was touched."""
    lines = [f"{file.name}\0{file.size}\0{file.changed}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def cut_units(files: list[InputFile], parquet_column: str) -> tuple[list[Unit], list[str]]:
    """Units in the order of the files, and the files that could not be opened (name and reason).

    Raises ValueError for a Parquet file without the column, RuntimeError if pyarrow is needed and absent.
    """
    units: list[Unit] = []
    bad: list[str] = []
    for batch in _batches(files):
        file = batch[0]
        if file.kind == "text":
            units.append(Unit("text", tuple(batch), 0, 0, sum(member.size for member in batch)))
        elif file.kind == "jsonl":
            for start in range(0, file.size, _UNIT_BYTES):
                stop = min(start + _UNIT_BYTES, file.size)
                units.append(Unit("jsonl", (file,), start, stop, stop - start))
        else:
            try:
                units += _cut_parquet(file, parquet_column)
            except OSError as error:
                bad.append(f"{file.name}: {error}")
    return units, bad


def _batches(files: list[InputFile]) -> Iterator[list[InputFile]]:
    """Runs of text files that together make a unit; every other file alone."""
    batch: list[InputFile] = []
    size = 0
    for file in files:
        if batch and (file.kind != "text" or size >= _UNIT_BYTES):
            yield batch
            batch, size = [], 0
        if file.kind == "text":
            batch.append(file)
            size += file.size
        else:
            yield [file]
    if batch:
        yield batch


def read_unit(unit: Unit, jsonl_key: str, parquet_column: str) -> Documents:
    """The documents of a unit, in order, and what had to be left out."""
    documents = Documents()
    if unit.kind == "text":
        for file in unit.files:
            try:
                documents.add(Path(file.path).read_bytes().decode("utf-8"), file.name)
            except UnicodeDecodeError as error:
                documents.bad.append(f"{file.name}: not UTF-8 at byte {error.start}")
            except OSError as error:
                documents.bad.append(f"{file.name}: {error}")
    elif unit.kind == "jsonl":
        for offset, line in _lines(unit):
            _read_json_line(line, jsonl_key, f"{unit.files[0].name}, line at byte {offset}", documents)
    else:
        _read_parquet(unit, parquet_column, documents)
    return documents


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Byte offset and content of the lines that begin within the unit."""
    with open(unit.files[0].path, "rb") as file:
        if unit.start:
            # A line begun before this unit belongs to the unit before; reading from the byte before
            # ours ends at once when that byte is the newline.
            file.seek(unit.start - 1)
            file.readline()
        while (offset := file.tell()) < unit.stop and (line := file.readline()):
            yield offset, line


def _read_json_line(line: bytes, key: str, name: str, documents: Documents) -> None:
    if not line.strip():
        return
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        documents.bad.append(f"{name}: not UTF-8 at its byte {error.start}")
        return
    except (ValueError, RecursionError) as error:
        documents.bad.append(f"{name}: broken JSON ({error})")
        return
    if not isinstance(content, dict) or key not in content:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else "no object"
        documents.bad.append(f"{name}: no key {key!r} (has: {keys})")
    elif not isinstance(content[key], str):
        documents.bad.append(f"{name}: {key!r} is no text but {type(content[key]).__name__}")
    else:
        documents.add(content[key], name)


def _parquet() -> Any:
    # Imported on need: it takes a third of a second, and most corpora hold no Parquet.
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError("reading Parquet needs pyarrow; run `pip install pyarrow`") from error
    return pyarrow.parquet


def _cut_parquet(file: InputFile, column: str) -> list[Unit]:
    from pyarrow import ArrowException, types

    try:
        parquet = _parquet().ParquetFile(file.path)
    except ArrowException as error:
        raise OSError(f"broken Parquet ({error})") from error
    with parquet:
        schema, groups = parquet.schema_arrow, parquet.metadata.num_row_groups
        if column not in schema.names:
            raise ValueError(
                f"{file.path} has no column {column!r}; "
                f"set parquet_column to one of {', '.join(schema.names)}"
            )
        kind = schema.field(column).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(
                f"column {column!r} of {file.path} holds {kind}, not text; choose parquet_column anew"
            )
        return [Unit("parquet", (file,), group, group + 1, file.size // groups) for group in range(groups)]


def _read_parquet(unit: Unit, column: str, documents: Documents) -> None:
    from pyarrow import ArrowException

    file = unit.files[0]
    try:
        with _parquet().ParquetFile(file.path) as parquet:
            rows = parquet.read_row_group(unit.start, columns=[column]).column(column).to_pylist()
    except (ArrowException, OSError) as error:
        documents.bad.append(f"{file.name}, row group {unit.start}: {error}")
        return
    for row, text in enumerate(rows):
        documents.add(text or "", f"{file.name}, row {row} of group {unit.start}")
