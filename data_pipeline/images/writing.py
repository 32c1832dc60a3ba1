"""What the commands share: shards written by WebDataset, a manifest, and reuse of what is there."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from triptych.data_pipeline.images.index import load_index
from triptych.data_pipeline.images.options import DigitsOptions, LatentsOptions, ShardOptions
from triptych.data_pipeline.manifest import NAME, file_digest
from triptych.data_pipeline.workspace import only_builder, replacement

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

Options = DigitsOptions | ShardOptions | LatentsOptions

_VERSION = 1
_NAMED_BAD = 1000


@dataclass
class ImageManifest:
    """manifest.json of a directory of splits: what it was made from, and how to tell that it is whole."""

    command: str
    """digits, images, coco, masks or latents."""
    options: dict[str, Any]
    """The options that shape the result."""
    inputs_digest: str
    splits: dict[str, int] = field(default_factory=dict)
    """Samples of each split; "" is the directory itself."""
    bad_count: int = 0
    bad: list[str] = field(default_factory=list)
    """Inputs left out with the reason, the first 1000."""
    dropped: dict[str, int] = field(default_factory=dict)
    """What was left out of inputs that were used, and how often."""
    notes: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per file, but for indexes: bytes, sha256."""
    version: int = _VERSION

    def leave_out(self, name: str, reason: str, limit: int) -> None:
        """Counts and names an input; ValueError once there are more than limit (max_bad_samples)."""
        self.bad_count += 1
        if len(self.bad) < _NAMED_BAD:
            self.bad.append(f"{name}: {reason}")
        if self.bad_count > limit:
            raise ValueError(
                f"{self.bad_count} inputs cannot be used, more than max_bad_samples={limit}: "
                f"{'; '.join(self.bad[:5])}; mend them or raise max_bad_samples"
            )

    def damage(self, directory: Path) -> str | None:
        """What is missing or altered in the directory, read in full; None if nothing is."""
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != expected["bytes"] or file_digest(path) != expected["sha256"]:
                return f"{path} was altered"
        return None


@dataclass(frozen=True)
class ImageReport:
    """What one of the commands did."""

    out: str
    reused: bool
    """The directory already held these shards; nothing was written."""
    seconds: float
    manifest: ImageManifest

    def summary(self) -> str:
        """Some lines for the terminal."""
        made = self.manifest
        size = sum(each["bytes"] for each in made.files.values())
        lines = [
            f"{'found' if self.reused else 'wrote'} {self.out} in {self.seconds:.1f} s, {size / 1e6:.1f} MB"
        ]
        for name, count in made.splits.items():
            prefix = f"{name}/" if name else ""
            shards = sum(file.startswith(prefix) and file.endswith(".tar") for file in made.files)
            lines.append(f"  {name or 'all':<6} {count} samples in {shards} shards")
        if made.bad_count:
            lines.append(f"  left out as bad: {made.bad_count}")
            lines += [f"    {bad}" for bad in made.bad[:5]]
            if made.bad_count > 5:
                lines.append(f"    ... the rest is named in {NAME}")
        lines += [f"  left out: {count} {what}" for what, count in made.dropped.items()]
        return "\n".join(lines + [f"  note: {note}" for note in made.notes])


def build(
    command: str,
    options: Options,
    indifferent: set[str],
    inputs_digest: str,
    make: Callable[[Path, ImageManifest], None],
    replaced: Mapping[str, Any] | None = None,
) -> ImageReport:
    """Calls make(directory, manifest) to fill `options.out`, unless it holds that already.

    indifferent: options that do not change what is built. replaced: values to record in place of those of
    options. Raises ValueError if `out` is taken by something else or, without options.overwrite, by shards
    made otherwise; `out` is then, and whenever make raises, as it was before.
    """
    started = time.monotonic()
    relevant = options.model_dump(mode="json", exclude={"out", "overwrite", *indifferent})
    wanted = ImageManifest(command, {**relevant, **(replaced or {})}, inputs_digest)
    out = Path(os.path.abspath(options.out))
    with only_builder(out):
        found = _existing(out, wanted, options.overwrite)
        if found is not None:
            damage = found.damage(out)
            if damage is None and found.inputs_digest == inputs_digest and found.options == wanted.options:
                return ImageReport(options.out, True, time.monotonic() - started, found)
            wanted.notes.append(
                f"replaced what was in {out}: {damage or 'its inputs or the options changed'}"
            )
        with replacement(out) as workspace:
            make(workspace, wanted)
            wanted.files = {
                path.relative_to(workspace).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": file_digest(path),
                }
                for path in sorted(workspace.rglob("*"))
                if path.is_file() and not path.name.endswith(".index.npz")
            }
            text = json.dumps(asdict(wanted), indent=1, ensure_ascii=False)
            (workspace / NAME).write_bytes(text.encode("utf-8", "backslashreplace"))
    return ImageReport(options.out, False, time.monotonic() - started, wanted)


def _existing(out: Path, wanted: ImageManifest, overwrite: bool) -> ImageManifest | None:
    """The manifest in `out`, None if `out` is free; ValueError if it may not be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a directory")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / NAME).is_file():
        raise ValueError(f"out={out} is not empty and holds no shards of ours; name another directory")
    try:
        found = ImageManifest(**json.loads((out / NAME).read_text(encoding="utf-8")))
        if found.version != _VERSION:
            raise ValueError(f"version {found.version}, this is version {_VERSION}")
    except (OSError, ValueError, TypeError) as error:
        if overwrite:
            return None
        raise ValueError(f"{out / NAME} cannot be used ({error}); build again with overwrite=true") from error
    before = {**found.options, "command": found.command}
    changed = [
        f"{key}: {before.get(key)} -> {value}"
        for key, value in {**wanted.options, "command": wanted.command}.items()
        if before.get(key) != value
    ]
    if changed and not overwrite:
        raise ValueError(
            f"out={out} holds shards made otherwise ({'; '.join(changed)}); name another directory or set "
            "overwrite=true"
        )
    return found


class SplitWriter:
    """Shards of one split, `prefix-000000.tar` and on, each with its index. The bytes depend on nothing
    else."""

    def __init__(self, directory: Path, prefix: str, samples_per_shard: int) -> None:
        from webdataset import ShardWriter

        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.count = directory, 0
        self._writer = ShardWriter(
            f"{directory}/{prefix}".replace("%", "%%") + "-%06d.tar",
            maxcount=samples_per_shard,
            verbose=0,
            encoder=False,
            mtime=0,  # a float would take a header of its own in each member
        )

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """members: by suffix."""
        self._writer.write({"__key__": key, **members})
        self.count += 1

    def close(self) -> int:
        """Ends the last shard and indexes all of them; how many there are."""
        self._writer.close()
        shards = sorted(self.directory.glob("*.tar"))
        for shard in shards:
            load_index(shard)
        return len(shards)


def digest_of(parts: list[str]) -> str:
    """SHA-256 of some lines of text."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
