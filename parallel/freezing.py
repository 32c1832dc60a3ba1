"""Parameters, and rows of parameters, that training leaves as they are (`train.freeze`).

A pattern is a glob of names in the whole model, such as "blocks.*" or "patch_embedding.*", or one with rows
of dimension 0 behind it, "blocks.3.ffn.experts.up_proj[0:16]". Whole parameters ask for no gradient, so that
nothing is computed, summed or kept for them. Rows get a gradient, which is set to zero before anything reads
it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from triptych.models.config import ModelConfig
from triptych.models.count import build_on_meta
from triptych.parallel.shards import Window, local_part, window

_ROWS = re.compile(r"(?P<glob>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")


class Pattern(NamedTuple):
    """One entry of `train.freeze`. start, stop: rows of dimension 0; stop None: to the last; both None:
    all."""

    glob: str
    start: int | None = None
    stop: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it freezes parameters as a whole, not some of their rows."""
        return self.start is None


@functools.cache
def parse(text: str) -> Pattern:
    """A pattern from its text.

    >>> parse("blocks.3.ffn.experts.up_proj[0:16]")
    Pattern(glob='blocks.3.ffn.experts.up_proj', start=0, stop=16)
    >>> parse("blocks.*")
    Pattern(glob='blocks.*', start=None, stop=None)
    """
    match = _ROWS.fullmatch(text)
    if match is None:
        return Pattern(text)
    return Pattern(match["glob"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None)


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether the parameter `name` of the whole model is frozen as a whole."""
    return any(found.whole and fnmatchcase(name, found.glob) for found in map(parse, patterns))


def trained_rows(name: str, held: Window, patterns: Iterable[str]) -> list[slice] | None:
    """The rows of a rank's window of the parameter `name` that are trained, in the window's own numbers.

    None: no pattern speaks of its rows, so all of them are.
    """
    found = [p for p in map(parse, patterns) if p.start is not None and fnmatchcase(name, p.glob)]
    if not found:
        return None
    first, size = held.offset[0], held.shape[0]
    trained, at = [], 0
    for start, stop in sorted(
        (p.start or 0, held.global_shape[0] if p.stop is None else p.stop) for p in found
    ):
        low, high = min(max(start - first, 0), size), min(max(stop - first, 0), size)
        if low > at:
            trained.append(slice(at, low))
        at = max(at, high)
    return [*trained, slice(at, size)] if at < size else trained


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Whole parameters among `patterns` ask for no gradient. To be called before data sharding, which
    sets up what it reduces by it."""
    for name, parameter in module.named_parameters():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)


@torch.no_grad()
def mask_frozen_rows(named_parameters: Iterable[tuple[str, torch.Tensor]], patterns: Sequence[str]) -> None:
    """Set the gradient of frozen rows to zero, so that no norm counts them. After gradients are summed."""
    if all(parse(text).whole for text in patterns):
        return
    for name, parameter in named_parameters:
        if parameter.grad is None:
            continue
        held = window(parameter)
        trained = trained_rows(name, held, patterns)
        if trained is not None:
            for rows in _others(trained, held.shape[0]):
                local_part(parameter.grad)[rows] = 0


def check_freeze(config: ModelConfig, patterns: Sequence[str]) -> None:
    """Raises ValueError for a pattern that matches no parameter, or rows that a parameter has not got, and
    where nothing is left to train."""
    if not patterns:
        return
    model = build_on_meta(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for text in patterns:
        _check_one(text, shapes)
    if not _trained_elements(model, patterns):
        raise ValueError(f"train.freeze={list(patterns)} leaves nothing to train; remove a pattern")


def count_trainable(config: ModelConfig, patterns: Sequence[str]) -> tuple[int, int]:
    """Elements of the whole model's parameters that are trained, and all of them."""
    model = build_on_meta(config)
    return _trained_elements(model, patterns), sum(parameter.numel() for parameter in model.parameters())


def _check_one(text: str, shapes: Mapping[str, torch.Size]) -> None:
    pattern = parse(text)
    matched = {name: shape for name, shape in shapes.items() if fnmatchcase(name, pattern.glob)}
    if not matched:
        near = sorted({name.split(".")[0] for name in shapes})
        raise ValueError(
            f"train.freeze: {text!r} matches no parameter of the model; names begin with {', '.join(near)}, "
            "and `*` stands for anything"
        )
    for name, shape in matched.items() if not pattern.whole else ():
        rows = shape[0] if shape else 0
        if not pattern.start < (rows if pattern.stop is None else pattern.stop) <= rows:  # type: ignore[operator]
            raise ValueError(
                f"train.freeze: {text!r} asks for rows that {name} of shape {tuple(shape)} has not got; give "
                f"FIRST:END within 0:{rows}, or the name alone for all of it"
            )


def _trained_elements(model: nn.Module, patterns: Sequence[str]) -> int:
    total = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or is_frozen(name, patterns):
            continue
        shape = parameter.shape
        trained = trained_rows(name, Window((0,) * len(shape), tuple(shape), tuple(shape)), patterns)
        if trained is None:
            total += shape.numel()
        else:
            total += sum(rows.stop - rows.start for rows in trained) * shape[1:].numel()
    return total


def _others(rows: Sequence[slice], size: int) -> list[slice]:
    """What ascending slices leave out of 0:size."""
    edges = [0, *(edge for part in rows for edge in (part.start, part.stop)), size]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
