"""Layouts as one word: "tp2", "tp2.pp2", "dp_shard2.dp_replicate2+selective"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from triptych.parallel.config import ParallelConfig

AXES = ("tp", "pp", "ep", "dp_shard", "dp_replicate")
SWITCHES: dict[str, dict[str, object]] = {
    "none": {"recompute": "none"},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "sp": {"sequence_parallel": True},
    "nosp": {"sequence_parallel": False},
}

DEFAULT = (
    "tp2+selective",
    "tp4+none",
    "pp2+full",
    "pp4+none",
    "dp_shard2+selective",
    "dp_replicate2+none",
    "dp_shard2.dp_replicate2+full",
    "tp2.pp2+selective",
    "tp2.dp_shard2+full",
    "tp2.pp2.dp_shard2+selective",
)
"""What `verify` runs when it is told nothing: each axis alone and in company, each recomputation several
times."""

DEFAULT_OF_EXPERTS = (
    "ep2+selective",
    "ep4+none",
    "ep2.tp2+selective",
    "ep2.pp2+none",
    "ep2.dp_shard2+full",
    "ep2.dp_shard4+none",
)
"""And besides, for a model with experts."""


@dataclass(frozen=True)
class LayoutName:
    """A layout as it was written, and what it means."""

    text: str
    config: ParallelConfig


def parse_layout(text: str, base: ParallelConfig) -> LayoutName:
    """ "tp2.pp2+full+nosp" -> axes tp 2 and pp 2, all others 1; what follows "+" replaces what `base` says.

    Axes: tp, pp, ep, dp_shard, dp_replicate, and dp for dp_shard, joined by "." or ",". ep is folded over the
    data axes; where none is given it stands for as many replicas. Switches: none, selective, full
    (recomputation), sp, nosp (sequence parallelism).
    Raises ValueError naming the part that cannot be read.
    """
    axes, *switches = text.replace(" ", "").split("+")
    values: dict[str, object] = dict.fromkeys(AXES, 1)
    seen = set()
    for part in re.split(r"[.,]", axes):
        match = re.fullmatch(r"([a-z_]+?)([0-9]+)", part)
        axis = {"dp": "dp_shard"}.get(match[1], match[1]) if match else ""
        if match is None or axis not in AXES or int(match[2]) < 1:
            raise ValueError(
                f"layout {text!r}: {part!r} is no axis and degree; write such as tp2, pp2, dp_shard2 or "
                'dp_replicate2, joined by "."'
            )
        if axis in seen:
            raise ValueError(f"layout {text!r} gives {axis} twice; give each axis once")
        seen.add(axis)
        values[axis] = int(match[2])
    if "ep" in seen and not seen & {"dp_shard", "dp_replicate"}:
        values["dp_replicate"] = values["ep"]
    for switch in switches:
        if switch not in SWITCHES:
            raise ValueError(
                f'layout {text!r}: {switch!r} after "+" is unknown; use one of {", ".join(SWITCHES)}'
            )
        values |= SWITCHES[switch]
    return LayoutName(text, ParallelConfig.model_validate(base.model_dump() | values))


def default_layouts(base: ParallelConfig, experts: bool = False) -> list[LayoutName]:
    """The ten of DEFAULT; with experts those for experts, too."""
    return [parse_layout(text, base) for text in (*DEFAULT, *(DEFAULT_OF_EXPERTS if experts else ()))]
