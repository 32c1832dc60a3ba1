"""Which checkpoint a run starts from, whether it belongs to the run, and reading it back."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from triptych.training import store
from triptych.training.group import Group
from triptych.training.shards import Shard

log = logging.getLogger("triptych.training.recovery")

CHECKPOINTS = "checkpoints"
"""Name of the directory of checkpoints in a run directory."""
# How the same numbers are computed, and where: a checkpoint may be resumed with others.
_FREE_MODEL_KEYS = frozenset({"form", "chunk_size"})
_FREE_KEYS = frozenset({"train.steps", "train.eval_every", "train.eval_samples", "train.micro_batch_size"})


def choose(resume: str, root: Path, group: Group, *, restarted: bool = False) -> Path | None:
    """The checkpoint that a run with checkpoints under `root` goes on from; None starts afresh.

    resume: `checkpoint.resume`. restarted: the same run was started before and died, so whatever `resume`
    says, its own newest checkpoint counts. A collective call. Raises ValueError where there is nothing valid
    to resume, and for `never` in a directory that has checkpoints.
    """
    if resume == "never" and not restarted:
        present = group.broadcast(store.list_steps(root))
        if present:
            raise ValueError(
                f"checkpoint.resume=never, but {root} already holds {present[0].name}; use another run "
                "directory, or checkpoint.resume=auto to go on from it"
            )
        return None
    target = None if resume in ("auto", "never") else locate(Path(resume))
    if target is not None and not restarted and target.resolve().parent == root.resolve():
        _require_valid(target, group)
        _set_aside_newer(root, target, group, "superseded")
        return target
    own = store.find_latest(root, group)
    if own is not None:
        _set_aside_newer(root, own, group, "corrupt")
        return own
    if target is None:
        return None
    if store.is_checkpoint(target):
        _require_valid(target, group)
        return target
    newest = store.find_latest(target, group)
    if newest is None:
        raise ValueError(f"checkpoint.resume={resume}: there is no checkpoint in {target}")
    return newest


def locate(path: Path) -> Path:
    """A checkpoint, or a directory of checkpoints, from a path to either or to a run directory.

    Raises ValueError if it is none of them.
    """
    if store.is_checkpoint(path):
        return path
    for root in (path / CHECKPOINTS, path):
        if store.list_steps(root):
            return root
    raise ValueError(
        f"{path} holds no checkpoint; give a run directory, or a directory such as "
        f"{path / CHECKPOINTS / 'step-00000100'}"
    )


def newest_in(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest valid one of a run directory."""
    target = locate(path)
    if store.is_checkpoint(target):
        _require_valid(target, Group())
        return target
    newest = store.find_latest(target)
    assert newest is not None, f"{target} was located because it holds checkpoints"
    return newest


def check_same_run(directory: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the configuration of a checkpoint with a run's, both {section: nested dict}.

    Raises ValueError naming each key of `model:` that differs and shapes the mathematics; other sections may
    differ, and what differs in `train:` and `data:` is logged.
    """
    differing = differences(saved["model"], wanted["model"], "model")
    fixed = {key: values for key, values in differing.items() if key.split(".")[-1] not in _FREE_MODEL_KEYS}
    if fixed:
        listed = "; ".join(f"{key} is {old!r} there and {new!r} here" for key, (old, new) in fixed.items())
        raise ValueError(
            f"checkpoint {directory} is of another model: {listed}. Set these keys as they were, or start in "
            "another run directory"
        )
    for section in ("train", "data"):
        for key, (old, new) in differences(saved[section], wanted[section], section).items():
            if key not in _FREE_KEYS:
                log.warning("resuming %s with %s=%r, which was %r", directory, key, new, old)


def check_moments(directory: Path, saved: Container[str], wanted: Iterable[Shard]) -> None:
    """Raises ValueError where the checkpoint has no moments of what is trained: it was frozen when the
    checkpoint was written, or the checkpoint is of `triptych experts`, which writes none."""
    missing = next((shard.name for shard in wanted if shard.name not in saved), None)
    if missing is not None:
        name = missing.removeprefix("optimizer/").rpartition("/")[0]
        raise ValueError(
            f"checkpoint {directory} has no moments of {name}, which was not trained there (train.freeze, or "
            "triptych experts) and is trained here; freeze it as well, or begin a new run with "
            f"train.finetune.checkpoint={directory}"
        )


def differences(old: Any, new: Any, prefix: str) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every leaf that differs between two nested dicts."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*old, *new}):
            found |= differences(old.get(key), new.get(key), f"{prefix}.{key}")
        return found
    return {} if old == new else {prefix: (old, new)}


def _require_valid(directory: Path, group: Group) -> None:
    verdict = store.shared_problem(directory, group)
    if verdict is not None:
        raise ValueError(f"checkpoint {directory} cannot be used: {verdict}; choose another one")


def _set_aside_newer(root: Path, chosen: Path, group: Group, why: str) -> None:
    """Rename checkpoints newer than the chosen one, which is about to be continued in another way."""
    if group.rank == 0:
        for directory in store.list_steps(root):
            if directory.name == chosen.name:
                break
            log.warning("%s is set aside as %s", directory, store.set_aside(directory, why).name)
    group.gather(None)
