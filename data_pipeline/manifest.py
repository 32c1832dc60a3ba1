"""manifest.json of a corpus: what it was made from, what it holds, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Everything a corpus directory says about itself."""

    sources: list[str]
    options: dict[str, Any]
    """The options that shape the result (not out, workers, overwrite)."""
    inputs_digest: str
    """SHA-256 over name, size and time of change of every input file."""
    vocab_size: int
    tokenizer_digest: str
    eod_token: str
    eod_id: int
    files_read: int
    bytes_read: int
    empty: int
    """Inputs with no text in them, left out."""
    bad_count: int
    bad: list[str]
    """Inputs left out with the reason, the first 1000."""
    notes: list[str]
    """What the builder decided by itself and a reader should know."""
    text_bytes: int
    """UTF-8 bytes of the documents kept."""
    splits: dict[str, dict[str, int]]
    """Per split (`train`, `valid`): documents and tokens."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per file of the corpus: bytes, sha256."""
    version: int = _VERSION

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest of a corpus directory, None if it has none. Raises ValueError if it cannot be read."""
        path = directory / NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']}, this is version {_VERSION}")
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be used ({error}); build the corpus again with overwrite=true"
            ) from error

    def write(self, directory: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        # A file name that is no UTF-8 may be among the bad inputs; its name is shown, not kept byte for byte.
        (directory / NAME).write_bytes(text.encode("utf-8", "backslashreplace"))

    def damage(self, directory: Path) -> str | None:
        """What is missing or altered in the directory, read in full; None if nothing is."""
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if file_digest(path) != expected["sha256"]:
                return f"{path} was altered: its SHA-256 differs"
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class CorpusReport:
    """What `triptych data text` did."""

    out: str
    reused: bool
    """The directory already held this corpus; nothing was written."""
    seconds: float
    manifest: Manifest

    def summary(self) -> str:
        """Some lines for the terminal."""
        made, tokens = self.manifest, sum(split["tokens"] for split in self.manifest.splits.values())
        per_token = made.text_bytes / max(tokens, 1)
        lines = [
            f"{'found' if self.reused else 'wrote'} {self.out} in {self.seconds:.1f} s",
            f"  read   {made.bytes_read / 1e6:.1f} MB in {made.files_read} files ({', '.join(made.sources)})",
            f"  tokens {tokens} of {per_token:.2f} bytes; vocabulary {made.vocab_size}",
        ]
        for name, split in made.splits.items():
            lines.append(f"  {name:<6} {split['documents']} documents, {split['tokens']} tokens")
        if made.empty:
            lines.append(f"  left out as empty: {made.empty}")
        if made.bad_count:
            lines.append(f"  left out as bad: {made.bad_count}")
            lines += [f"    {bad}" for bad in made.bad[:5]]
            if made.bad_count > 5:
                lines.append(f"    ... the rest is named in {NAME}")
        return "\n".join(lines + [f"  note: {note}" for note in made.notes])
