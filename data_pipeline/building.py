"""The work behind `text.py`: train the tokenizer, tokenize in processes, write splits and manifest."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.config import TextCorpusOptions
from triptych.data_pipeline.indexed import IndexedTokens, IndexedWriter, best_dtype
from triptych.data_pipeline.manifest import Manifest, file_digest
from triptych.data_pipeline.sources import InputFile, Unit, cut_units, inputs_digest, look_again, read_unit
from triptych.data_pipeline.tokenizer import TextTokenizer, train_tokenizer

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): stages `scan` (files), `tokenizer` and `tokenize` (bytes of input)."""

SPLITS = ("train", "valid")

_NAMED_BAD = 1000
_TOKENIZER_FILE = "tokenizer.json"
_PARALLELISM = "TOKENIZERS_PARALLELISM"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fingerprint:
    """What a corpus is a function of; two equal ones need no second build."""

    options: dict[str, Any]
    inputs_digest: str


@dataclass(frozen=True)
class _UnitTokens:
    """A tokenized unit: per split the tokens back to back and the length of each document."""

    splits: dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]
    text_bytes: int
    bad: list[str]
    empty: int


def is_held_out(text: str, valid_share: float) -> bool:
    """Whether a document is for validation: the hash of its content lies in the lowest share of all."""
    value = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
    return value < int(valid_share * 2**64)


@dataclass
class Builder:
    """One building of a corpus in an empty directory."""

    options: TextCorpusOptions
    files: list[InputFile]
    workspace: Path
    progress: Progress
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    empty: int = 0
    text_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def build(self, wanted: Fingerprint, note: str | None) -> Manifest:
        """Writes everything, the manifest last. `note` is one more remark for the manifest."""
        units, unreadable = cut_units(self.files, self.options.parquet_column)
        self.leave_out(unreadable)
        workers = self.options.workers or available_cores()
        with Processes(min(workers, len(units))) as processes:
            tokenizer = self.get_tokenizer(units, processes)
            self.tokenize(units, processes)
        if self.options.valid_share > 0:
            self.ensure_both_splits()
        if inputs_digest(look_again(self.files)) != wanted.inputs_digest:
            raise RuntimeError("an input file changed while it was read; run again when nothing writes to it")
        self.notes += [note] if note else []
        manifest = Manifest(
            sources=list(self.options.source),
            options=wanted.options,
            inputs_digest=wanted.inputs_digest,
            vocab_size=tokenizer.vocab_size,
            tokenizer_digest=tokenizer.digest,
            eod_token=tokenizer.eod_token,
            eod_id=tokenizer.eod_id,
            files_read=len(self.files),
            bytes_read=sum(file.size for file in self.files),
            empty=self.empty,
            bad_count=self.bad_count,
            bad=self.bad,
            notes=self.notes,
            text_bytes=self.text_bytes,
            splits=self.describe_splits(),
            files={
                path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                for path in sorted(self.workspace.iterdir())
            },
        )
        manifest.write(self.workspace)
        return manifest

    def leave_out(self, bad: list[str]) -> None:
        """Counts and names inputs that cannot be used, or refuses them under options.strict."""
        if bad and self.options.strict:
            raise ValueError(f"bad input: {bad[0]}; mend it, or leave it out with strict=false")
        self.bad_count += len(bad)
        self.bad += bad[: _NAMED_BAD - len(self.bad)]

    def get_tokenizer(self, units: list[Unit], processes: Processes) -> TextTokenizer:
        """The tokenizer given or trained, also written to the workspace, where the processes find it."""
        options = self.options
        if options.tokenizer is not None:
            tokenizer = TextTokenizer.load(options.tokenizer, eod_token=options.eod_token)
            tokenizer.eod_id  # noqa: B018 - raises, before any work is done, if nothing can end a document
        else:
            # Units in order of a hash, so that the subset is spread over the input.
            spread = sorted(units, key=_unit_hash)
            self.progress("tokenizer", 0, options.tokenizer_bytes)
            ((text, trained_on),) = processes.map(_train, [(spread, options)])
            tokenizer = TextTokenizer(text)
            self.progress("tokenizer", options.tokenizer_bytes, options.tokenizer_bytes)
            self.notes.append(
                f"the tokenizer was trained on {trained_on / 1e6:.1f} MB of the training documents"
            )
            if tokenizer.vocab_size < options.vocab_size:
                self.notes.append(
                    f"vocab_size={options.vocab_size} was asked for, the text gave {tokenizer.vocab_size}"
                )
        (self.workspace / _TOKENIZER_FILE).write_text(tokenizer.text, encoding="utf-8")
        return tokenizer

    def tokenize(self, units: list[Unit], processes: Processes) -> None:
        """Tokenizes all units and writes train and, if asked for, valid."""
        splits = SPLITS if self.options.valid_share > 0 else SPLITS[:1]
        path = self.workspace / _TOKENIZER_FILE
        dtype = best_dtype(_load_tokenizer(str(path), self.options.eod_token).vocab_size)
        total, done = sum(unit.size for unit in units), 0
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(IndexedWriter(self.workspace / split, dtype)) for split in splits
            }
            results = processes.map(_tokenize, ((unit, self.options, str(path)) for unit in units))
            for unit, result in zip(units, results):
                self.leave_out(result.bad)
                self.empty += result.empty
                self.text_bytes += result.text_bytes
                for split in splits:
                    writers[split].add_documents(*result.splits[split])
                done += unit.size
                self.progress("tokenize", done, total)
            if not any(writer.num_documents for writer in writers.values()):
                reasons = "; ".join(self.bad[:3]) or "all are empty"
                raise ValueError(f"no document is left of {', '.join(self.options.source)}: {reasons}")

    def ensure_both_splits(self) -> None:
        """Cuts the tail of the corpus off for validation where the hash left a split without documents.

        That happens with a handful of documents, most often with a single long one.
        """
        filled = [split for split in SPLITS if (self.workspace / f"{split}.bin").stat().st_size]
        if len(filled) == len(SPLITS):
            return
        whole = IndexedTokens(self.workspace / filled[0])
        # A copy, because the file under the memory map is written anew.
        flat, share = np.array(whole.flat), self.options.valid_share
        cut = round(len(flat) * (1 - share))
        if not 0 < cut < len(flat):
            raise ValueError(
                f"valid_share={share} of {len(flat)} tokens leaves a split empty; "
                "give more text or set valid_share=0"
            )
        for split, start, stop in zip(SPLITS, (0, cut), (cut, len(flat))):
            bounds = np.unique(np.clip(whole.offsets, start, stop))
            with IndexedWriter(self.workspace / split, whole.dtype) as writer:
                writer.add_documents(flat[start:stop], np.diff(bounds))
        self.notes.append(
            f"by hash, all {len(whole)} documents fell on one side of the split; instead the last "
            f"{share:.1%} of the tokens are for validation (the tokenizer has seen them)"
        )

    def describe_splits(self) -> dict[str, dict[str, int]]:
        splits = {}
        for split in SPLITS if self.options.valid_share > 0 else SPLITS[:1]:
            tokens = IndexedTokens(self.workspace / split)
            splits[split] = {"documents": len(tokens), "tokens": tokens.num_tokens}
        return splits


class Processes:
    """A pool of `count` fresh processes, or this one when count is 1.

    Spawned, never forked: the caller may hold threads (torch, Ray), which do not survive a fork.
    Each process tokenizes with one thread; the processes are the parallelism.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._parallelism: str | None = None

    def __enter__(self) -> Processes:
        if self.count > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_start_worker)
        else:
            self._parallelism = os.environ.get(_PARALLELISM)
            _one_thread()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        elif self._parallelism is None:
            os.environ.pop(_PARALLELISM, None)
        else:
            os.environ[_PARALLELISM] = self._parallelism

    def map(self, function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """Results in the order of the arguments, at most a few of which are under way at a time."""
        if self._pool is None:
            yield from (function(*each) for each in arguments)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for each in arguments:
                pending.append(self._pool.submit(function, *each))
                if len(pending) >= 4 * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of {self.count} tokenizing processes was killed, perhaps for memory; use fewer workers"
            ) from error


def available_cores() -> int:
    """Cores this process may use, which a container may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    os.environ[_PARALLELISM] = "false"


def _start_worker() -> None:
    """Prepares a process of the pool: one thread, Ctrl-C left to the parent, no life without the parent."""
    _one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker of the pool has a parent"
    # A parent killed outright closes nothing down; its pool would wait for work forever.
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _unit_hash(unit: Unit) -> str:
    name = f"{unit.files[0].name}\0{unit.start}"
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _train(units: list[Unit], options: TextCorpusOptions) -> tuple[str, int]:
    """tokenizer.json trained on the training documents of the first units, and their bytes."""
    texts: list[str] = []
    held_out: list[str] = []
    size = 0
    for unit in units:
        for text in read_unit(unit, options.jsonl_key, options.parquet_column).texts:
            if is_held_out(text, options.valid_share):
                held_out.append(text)
            else:
                texts.append(text)
                size += len(text.encode("utf-8"))
        if size >= options.tokenizer_bytes:
            break
    if not texts:
        # So few documents that all were held out; ensure_both_splits deals with it.
        texts, size = held_out, sum(len(text.encode("utf-8")) for text in held_out)
    return train_tokenizer(texts, options.vocab_size).text, size


@lru_cache(maxsize=1)
def _load_tokenizer(path: str, eod_token: str | None) -> TextTokenizer:
    return TextTokenizer.load(path, eod_token=eod_token)


def _tokenize(unit: Unit, options: TextCorpusOptions, tokenizer_path: str) -> _UnitTokens:
    tokenizer = _load_tokenizer(tokenizer_path, options.eod_token)
    documents = read_unit(unit, options.jsonl_key, options.parquet_column)
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in documents.texts:
        texts["valid" if is_held_out(text, options.valid_share) else "train"].append(text)
    return _UnitTokens(
        splits={split: tokenizer.encode_documents(texts[split]) for split in SPLITS},
        text_bytes=sum(len(text.encode("utf-8")) for text in documents.texts),
        bad=documents.bad,
        empty=documents.empty,
    )
