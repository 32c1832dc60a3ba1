"""Starting a run from the parameters of another one, whose input size and heads may differ
(`train.finetune`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from triptych import models
from triptych.training import recovery, store
from triptych.training.ema import PREFIX
from triptych.training.group import Group
from triptych.training.loading import averages_wanted
from triptych.training.shards import Reader, Shard, Window

log = logging.getLogger("triptych.training.finetune")

POSITIONS = "patch_embedding.positions"
"""The learned table (T, C) of a grid's places, in denoisers and vision backbones."""
_MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


class FinetuneConfig(BaseModel):
    """`train.finetune:`, the run whose parameters a new run starts from. A resumed run does not look at
    it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(min_length=1)
    """A checkpoint, or a run directory whose newest one is taken. Its model may have other heads and another
    input size; what has no counterpart of the same name and shape there keeps its initial values, and is
    named in a warning."""
    averages: bool | None = None
    """Take the averages of the parameters (true), the parameters themselves (false), or averages where there
    are any (null)."""
    resize_positions: bool = True
    """Interpolate a learned table of positions to the grid of this run's input size."""
    skip: tuple[str, ...] = ()
    """Globs of names that keep their initial values whatever the checkpoint has, such as "heads.*"."""


@dataclass(frozen=True)
class Report:
    """What became of a rank's parameters, or of the whole model's."""

    taken: tuple[str, ...]
    """Names of those read as they are."""
    resized: tuple[str, ...]
    """Names of those interpolated."""
    left: dict[str, str]
    """Name -> why it keeps its initial values."""


def start_from(
    shards: Iterable[Shard], config: FinetuneConfig, model: models.ModelConfig, group: Group
) -> Report:
    """Fill the parameters of a new run from `config.checkpoint`; the report is of the whole model.

    shards: this rank's windows, under their names in the whole model. model: the new run's. Every rank of
    `group` calls it. Raises ValueError where there is no such checkpoint, where nothing in it fits, and for a
    pattern of `skip` that matches nothing.
    """
    directory = recovery.newest_in(Path(config.checkpoint).expanduser())
    report = _merge(group.gather(_read(shards, config, model, directory)))
    names = {*report.taken, *report.resized, *report.left}
    for glob in config.skip:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"train.finetune.skip: {glob!r} matches no parameter of the model; remove it")
    if not report.taken and not report.resized:
        why = "; ".join(f"{name} ({reason})" for name, reason in list(report.left.items())[:4])
        raise ValueError(
            f"train.finetune.checkpoint={config.checkpoint}: nothing in {directory} fits this model: {why}, "
            "...; choose a checkpoint of a like model"
        )
    if group.rank == 0:
        _tell(directory, report)
    return report


def resize_positions(table_TC: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """A table of the places of a grid, (prod(old), C) -> (prod(new), C).

    Bicubic on images (with the filter widened where the grid shrinks, as timm has it), linear along one axis,
    trilinear along three.
    """
    mode = _MODES[len(old)]
    grid = table_TC.T.unflatten(1, old).unsqueeze(0)
    resized = F.interpolate(grid, size=new, mode=mode, align_corners=False, antialias=mode == "bicubic")
    return resized[0].flatten(1).T


def _read(
    shards: Iterable[Shard], config: FinetuneConfig, model: models.ModelConfig, directory: Path
) -> Report:
    """This rank's part of `start_from`."""
    prefix = PREFIX if averages_wanted(directory, config.averages) else "model/"
    taken, resized, left = [], [], {}
    with store.open_reader(directory) as reader:
        for shard in shards:
            name, wanted = shard.name, tuple(shard.global_shape)
            entry = reader.index.get(prefix + name)
            if any(fnmatchcase(name, glob) for glob in config.skip):
                left[name] = "train.finetune.skip"
            elif entry is None:
                left[name] = "not there"
            elif entry.shape == wanted:
                reader.read_into(Window(prefix + name, shard.tensor, wanted, tuple(shard.offset)))
                taken.append(name)
            elif name == POSITIONS and config.resize_positions and entry.shape[1:] == wanted[1:]:
                old, new = _grids(directory, model)
                table = resize_positions(_whole(reader, prefix + name), old, new)
                window = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
                shard.tensor.copy_(table[window])
                resized.append(name)
            else:
                left[name] = f"{entry.shape} there, {wanted} here"
    return Report(tuple(taken), tuple(resized), left)


def _grids(directory: Path, model: models.ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the checkpoint's model and of the new run's; models with a table of positions have one.

    Raises ValueError where they have another number of axes.
    """
    there: Any = models.read_config(store.load_state(directory)["config"]["model"])
    here: Any = model
    if len(there.grid) != len(here.grid):
        raise ValueError(
            f"train.finetune.checkpoint: {directory} has positions on the grid {list(there.grid)}, and this "
            f"model on {list(here.grid)}; set train.finetune.resize_positions=false to begin with new ones"
        )
    return tuple(there.grid), tuple(here.grid)


def _whole(reader: Reader, name: str) -> Tensor:
    shape = reader.index[name].shape
    tensor = torch.empty(shape, dtype=torch.float64 if reader.index[name].dtype == "F64" else torch.float32)
    reader.read_into(Window(name, tensor, shape, (0,) * len(shape)))
    return tensor


def _merge(reports: list[Report]) -> Report:
    """Of all ranks, which may hold parts of the same parameters or, of a pipeline, other ones."""
    taken = dict.fromkeys(name for report in reports for name in report.taken)
    resized = dict.fromkeys(name for report in reports for name in report.resized)
    left = {name: reason for report in reports for name, reason in report.left.items()}
    return Report(tuple(taken), tuple(resized), left)


def _tell(directory: Path, report: Report) -> None:
    resized = f", {', '.join(report.resized)} resized" if report.resized else ""
    log.info("starting from %s: %d tensors taken%s", directory, len(report.taken), resized)
    if report.left:
        listed = "; ".join(f"{name} ({reason})" for name, reason in report.left.items())
        log.warning("%d tensors keep their initial values: %s", len(report.left), listed)
