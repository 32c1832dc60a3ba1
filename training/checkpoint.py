"""Saving checkpoints: in the background, and committed by the group or not at all.

A checkpoint grows in a hidden temporary directory. Each rank leaves a part manifest when its file is on disk;
only when rank 0 has seen all of them does it write the marker and rename the directory (training/store.py has
the form). The ranks must see one file system. A rank that dies leaves a temporary directory that nobody takes
for a checkpoint and that the next start removes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from triptych.training import store
from triptych.training.group import Group
from triptych.training.shards import (
    Index,
    Shard,
    index_from_json,
    index_to_json,
    merge,
    part_index,
    write_file,
)

log = logging.getLogger("triptych.training.checkpoint")


class _Abandoned(Exception):
    """Another rank could not write its part."""


@dataclass
class _Job:
    step: int
    directory: Path
    file: str
    tensors: dict[str, Tensor]
    index: Index
    state: dict[str, Any]
    abort: threading.Event = field(default_factory=threading.Event)
    reason: str | None = None
    defect: BaseException | None = None
    written: threading.Event = field(default_factory=threading.Event)


class Checkpointer:
    """Saves the checkpoints of one run under `root`; every rank has one, and all call its methods together.

    keep: how many newest checkpoints stay. A save that meets an OSError (a full disk) is given up with a
    warning: the run goes on and older checkpoints stay as they are.
    """

    def __init__(
        self, root: Path, *, keep: int = 2, async_save: bool = True, group: Group | None = None
    ) -> None:
        self.root = root
        self.keep = keep
        self.async_save = async_save
        self.group = group or Group()
        self.token = self.group.broadcast(uuid.uuid4().hex[:8])
        self.failures = 0
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        if self.group.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            store.remove_leftovers(root)
        self.group.gather(None)

    def save(self, step: int, shards: Iterable[Shard], state: dict[str, Any]) -> None:
        """Copy the windows this rank writes to CPU memory and write them in the background.

        Waits for an earlier save first. `state` must be JSON values; rank 0's is saved.
        """
        self.wait()
        mine = [shard for shard in shards if shard.is_writer and shard.tensor.numel()]
        file = f"rank-{self.group.rank:05d}.safetensors"
        self._job = _Job(
            step=step,
            directory=self.root / f".tmp-step-{step:08d}-{self.token}",
            file=file,
            tensors={shard.name: shard.tensor.detach().to("cpu", copy=True) for shard in mine},
            index=part_index(file, mine),
            state=state,
        )
        self._thread = threading.Thread(target=self._run, args=(self._job,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.async_save:
            self.wait()

    def wait(self) -> None:
        """Wait until the outstanding save, if any, is committed or given up by all ranks.

        Raises RuntimeError, on all ranks, for anything but an OSError.
        """
        job, thread = self._job, self._thread
        if job is None or thread is None:
            return
        job.written.wait()
        if any(self.group.gather(job.reason)):
            # Rank 0 may not have heard: on a full disk not even the note of failure could be left.
            job.abort.set()
        thread.join()
        self._job = self._thread = None
        outcomes = self.group.gather((job.reason, job.defect is not None))
        failed = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(outcomes) if reason]
        if failed:
            self.failures += 1
            if self.group.rank == 0:
                shutil.rmtree(job.directory, ignore_errors=True)
        if any(defect for _, defect in outcomes):
            raise RuntimeError(f"saving step {job.step} failed: {'; '.join(failed)}") from job.defect

    def close(self, grace: float = 30.0) -> None:
        """Let an outstanding save end after a failure, when other ranks may be gone; not a collective call.

        Rank 0 waits `grace` seconds for the parts of the others, then gives the checkpoint up.
        """
        job, thread = self._job, self._thread
        if job is None or thread is None:
            return
        thread.join(grace)
        job.abort.set()
        thread.join(grace)
        self._job = self._thread = None

    def _run(self, job: _Job) -> None:
        try:
            self._write_part(job)
            job.written.set()
            if self.group.rank == 0:
                self._collect(job)
                self._commit(job)
        except (_Abandoned, OSError) as error:
            self._give_up(job, str(error))
        except BaseException as error:
            job.defect = error
            self._give_up(job, f"{type(error).__name__}: {error}")
        finally:
            job.written.set()

    def _write_part(self, job: _Job) -> None:
        job.directory.mkdir(parents=True, exist_ok=True)
        path = job.directory / job.file
        try:
            digest = write_file(path, job.tensors)
        except OSError:
            # Frees the room that the note of failure needs.
            path.unlink(missing_ok=True)
            raise
        finally:
            job.tensors = {}
        part = {
            "file": job.file,
            "bytes": path.stat().st_size,
            "sha256": digest,
            "index": index_to_json(job.index),
        }
        store.write_text(job.directory / _part_name(self.group.rank), json.dumps(part))

    def _collect(self, job: _Job) -> None:
        """Wait for the part manifests of all ranks."""
        pause = 0.01
        while True:
            names = set(os.listdir(job.directory))
            failed = sorted(name for name in names if name.endswith(".failed"))
            if failed:
                raise _Abandoned("; ".join((job.directory / name).read_text() or name for name in failed))
            if all(_part_name(rank) in names for rank in range(self.group.size)):
                return
            if job.abort.wait(pause):
                raise _Abandoned("a rank did not write its part")
            pause = min(2 * pause, 0.5)

    def _commit(self, job: _Job) -> None:
        directory = job.directory
        names = [_part_name(rank) for rank in range(self.group.size)]
        parts = [json.loads((directory / name).read_text()) for name in names]
        files = {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts}
        index = merge(index_from_json(part["index"]) for part in parts)
        for name, content in (("index.json", index_to_json(index)), ("state.json", job.state)):
            text = json.dumps(content, indent=1)
            store.write_text(directory / name, text)
            files[name] = {"bytes": len(text.encode()), "sha256": store.sha256(text)}
        manifest = json.dumps({"version": store.FORMAT_VERSION, "step": job.step, "files": files}, indent=1)
        store.write_text(directory / "manifest.json", manifest)
        for name in names:
            (directory / name).unlink()
        store.write_text(directory / "COMMITTED", store.sha256(manifest))
        final = self.root / f"step-{job.step:08d}"
        if final.exists():
            # Left by a future that was abandoned when an older checkpoint was resumed.
            store.remove(final)
        directory.rename(final)
        store.sync_directory(self.root)
        try:
            store.write_text(self.root / "latest", final.name)
            store.retain(self.root, self.keep)
        except OSError as error:
            log.warning("checkpoint %s is committed, but tidying up failed: %s", final, error)

    def _give_up(self, job: _Job, reason: str) -> None:
        job.reason = reason
        rank = self.group.rank
        if rank == 0:
            shutil.rmtree(job.directory, ignore_errors=True)
            newest = next(iter(store.list_steps(self.root)), None)
            log.warning(
                "checkpoint of step %d was NOT saved: %s. The run goes on; the newest one on disk is %s",
                job.step,
                reason,
                newest.name if newest else "none",
            )
        elif job.directory.exists():
            log.warning("rank %d could not write its part of the checkpoint: %s", rank, reason)
            try:
                store.write_text(job.directory / f"part-{rank:05d}.failed", f"rank {rank}: {reason}")
            except OSError:
                # The next wait() tells rank 0.
                log.warning("rank %d could not leave a note of it either", rank)


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"
