"""Mixers and feed-forwards by name, as a layer pattern writes them.

A mixer or feed-forward is a class built as `cls(config, layer)` (layer: index in the whole model), called as
`module(x_BTD, context) -> x_BTD`, with

- `check(config) -> None` (static): raises ValueError for a configuration it cannot be built from;
- `init() -> dict[str, Init]` and `sharding: dict[str, Cut]`, both by own or dotted child parameter name;
- `flops(length) -> int`: forward FLOPs of one sequence, two per multiply-add;
- `selective: tuple[str, ...]`: names of the methods that selective recomputation re-runs in backward;
- `tp_region = True`: see models/sharding.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

MIXERS: dict[str, Any] = {}
FEEDFORWARDS: dict[str, Any] = {}
CHARACTERS: dict[str, str] = {}
"""Character of a pattern string -> name of the mixer."""

FEEDFORWARD_CHARACTER = "-"
NONE = "none"


def register_mixer(name: str, char: str) -> Callable[[Class], Class]:
    """Class decorator: `name` in a pattern list, and `char` in a pattern string, stand for this mixer."""
    assert name not in MIXERS and name != NONE, f"mixer {name!r} is registered twice"
    assert len(char) == 1 and char not in CHARACTERS and char != FEEDFORWARD_CHARACTER, f"character {char!r}"

    def register(cls: Class) -> Class:
        MIXERS[name] = cls
        CHARACTERS[char] = name
        return cls

    return register


def register_ffn(name: str) -> Callable[[Class], Class]:
    """Class decorator: `name` after a "+" in a pattern item, or in model.ffn.kind, is this feed-forward."""
    assert name not in FEEDFORWARDS and name != NONE, f"feed-forward {name!r} is registered twice"

    def register(cls: Class) -> Class:
        FEEDFORWARDS[name] = cls
        return cls

    return register
