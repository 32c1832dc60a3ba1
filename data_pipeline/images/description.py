"""dataset.json of a directory of shards: what they hold, so that a run need not guess."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "dataset.json"
_VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a directory of shards says about itself."""

    kind: str
    """"images" or "latents"."""
    channels: int
    size: tuple[int, int] | None
    """Height and width, None where they differ from sample to sample."""
    count: int
    """Samples in all shards."""
    shards: int
    classes: tuple[str, ...] | None = None
    """Name of each label."""
    vae: str | None = None
    """Latents: what encoded them."""
    scale_factor: float | None = None
    """Latents: a model is to see (z - shift_factor) * scale_factor."""
    shift_factor: float | None = None
    scaled: bool = False
    """Latents: whether the values in the shards are scaled already; those we write never are."""
    latent_std: float | None = None
    """Latents: standard deviation of the values in the shards, over all of them."""
    version: int = _VERSION

    @classmethod
    def read(cls, directory: Path) -> Description | None:
        """The directory's dataset.json, None if it has none. Raises ValueError if it cannot be used."""
        path = directory / NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']}, this is version {_VERSION}")
            if content["kind"] not in ("images", "latents"):
                raise ValueError(f"kind {content['kind']!r}, which is neither images nor latents")
            for name in ("size", "classes"):
                if content.get(name) is not None:
                    content[name] = tuple(content[name])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be used ({error}); write the shards again") from error

    def write(self, directory: Path) -> None:
        """Writes dataset.json into the directory."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (directory / NAME).write_text(text + "\n", encoding="utf-8")
