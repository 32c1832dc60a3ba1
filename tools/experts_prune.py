"""A smaller model from the experts that one task uses: `triptych experts prune`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triptych import models
from triptych.models import Model
from triptych.models.count import build_on_meta
from triptych.tools.experts import (
    PARAMETERS,
    Source,
    check_target,
    count,
    mixtures,
    parallel_for,
    task_named,
    write_run,
)
from triptych.tools.experts_use import Observed, measure, observe, of_task
from triptych.tools.render import table_of
from triptych.tools.trained import load_trained
from triptych.training.ema import PREFIX

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[str], None]
PER_TASK = ("task_embedding.weight", "heads.log_variance")
"""Parameters of vision models with a row per task, besides gates."""
# Rounding of shares that add up to one.
_EPSILON = 1e-9


@dataclass(frozen=True)
class Kept:
    """The full experts of one layer that stay."""

    name: str
    experts: list[int]
    of: int
    share: float
    """Of the task's choices, with low-rank and identity experts, which all stay."""


@dataclass(frozen=True)
class Pruned:
    """What pruning did."""

    task: str
    layers: list[Kept]
    parameters_before: int
    parameters_after: int
    before: dict[str, float]
    """Metrics of the task."""
    after: dict[str, float] | None
    """None: nothing was written."""
    checkpoint: str | None

    def table(self) -> RenderableType:
        """Before and after, then the experts of each layer."""
        after = self.after or {}
        share = self.parameters_after / self.parameters_before
        rows = [
            ["parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,} ({100 * share:.1f} %)"]
        ]
        rows += [
            [name, f"{value:.4f}", f"{after[name]:.4f}" if name in after else "-"]
            for name, value in self.before.items()
        ]
        rows += [
            [
                f"experts of {kept.name}",
                str(kept.of),
                f"{len(kept.experts)} ({100 * kept.share:.1f} % of use)",
            ]
            for kept in self.layers
        ]
        where = f"written to {self.checkpoint}" if self.checkpoint else "nothing was written"
        title = f"Task {self.task}" if self.task else "Pruning"
        return table_of(title, ["figure", "before", "after"], rows, where)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def prune(
    path: str | Path,
    *,
    out: str | Path,
    task: str | None = None,
    keep_share: float | None = None,
    min_share: float | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Write a run that does one task with the experts that the task uses on the validation data.

    path: a run directory or a checkpoint. out: the new run directory, of a configuration and a checkpoint
    without moments, which evaluate, sample and train.finetune read. task: None where there is one.
    keep_share: each layer keeps the smallest set of experts that gets at least this share of the task's
    choices (0.99 where neither is given). min_share: or the experts of at least this share. Both keep so many
    that model.moe.top_k can be chosen. dry_run: say what would stay and write nothing.
    Raises ValueError where both are given, and for a run, task or target that cannot serve.
    """
    if keep_share is not None and min_share is not None:
        raise ValueError("give --keep-share or --min-share, not both")
    for name, value in (("--keep-share", keep_share), ("--min-share", min_share)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}={value} must be above 0 and at most 1")
    target, source, trained = check_target(out), Source.open(path), load_trained(path, device)
    name = task_named(trained.module, task)
    seen = observe(trained, samples, batch_size, progress)
    kept = choose(seen, name, 0.99 if keep_share is None else keep_share, min_share)
    sections = pruned_sections(source.sections, trained.module, name, kept)
    config = models.read_config(sections["model"])
    smaller = build_on_meta(config)
    indices = _indices(trained.module, name, kept)
    report = Pruned(
        task=name,
        layers=list(kept.values()),
        parameters_before=count(trained.module),
        parameters_after=count(smaller),
        before=of_task(seen.metrics, name),
        after=None,
        checkpoint=None,
    )
    if dry_run:
        return report
    tensors = {}
    for prefix in (PARAMETERS, PREFIX):
        held = source.tensors(prefix)
        for parameter, like in smaller.named_parameters() if held else ():
            tensor = held[parameter]
            for dim, index in indices.get(parameter, ()):
                tensor = tensor.index_select(dim, index)
            if tensor.shape != like.shape:
                raise ValueError(
                    f"{parameter} would be {tuple(tensor.shape)} and the pruned configuration says "
                    f"{tuple(like.shape)}: model.stages must not set num_experts_of; put it under model"
                )
            tensors[prefix + parameter] = tensor
    checkpoint = write_run(target, source, sections, tensors, "triptych experts prune")
    after = of_task(measure(load_trained(target, device), samples, batch_size, progress), name)
    return Pruned(**{**vars(report), "after": after, "checkpoint": str(checkpoint)})


def choose(seen: Observed, task: str, keep_share: float, min_share: float | None) -> dict[str, Kept]:
    """By name of the layer, which full experts stay. Raises ValueError for a task that no sample was of."""
    kept = {}
    for mixture, loads in seen.loads:
        shares = loads[task]
        if not bool(shares.sum() > 0):
            raise ValueError(
                f"--task {task}: no sample of the validation data is of it, so that its experts are unknown; "
                "name its data in data.valid"
            )
        experts = chosen_experts(
            shares, mixture.num_full, mixture.router.settings.top_k, keep_share, min_share
        )
        share = float(shares[experts].sum() + shares[mixture.num_full :].sum())
        kept[mixture.name] = Kept(mixture.name, experts, mixture.num_full, share)
    return kept


def chosen_experts(
    shares: Tensor, num_full: int, top_k: int, keep_share: float, min_share: float | None
) -> list[int]:
    """Ascending numbers of the full experts that stay.

    shares: (E,) of a task's choices, the full experts in front. Of equal shares the first experts stay.
    """
    order = shares[:num_full].argsort(descending=True, stable=True).tolist()
    least = max(1, top_k - (len(shares) - num_full))
    covered = float(shares[num_full:].sum())
    kept: list[int] = []
    for expert in order:
        share = float(shares[expert])
        wanted = covered < keep_share - _EPSILON if min_share is None else share >= min_share
        if not wanted and len(kept) >= least:
            break
        kept.append(expert)
        covered += share
    return sorted(kept)


def pruned_sections(
    sections: dict[str, Any], model: Model, task: str, kept: dict[str, Kept]
) -> dict[str, Any]:
    """The run's configuration with fewer experts and one task."""
    counts = []
    for mixture in mixtures(model):
        number = len(kept[mixture.name].experts)
        section = sections["model"][mixture.section]
        section["num_experts_of"] = {**section["num_experts_of"], str(mixture.layer): number}
        counts.append(number)
    for name in ("moe", "attention_moe"):
        section = sections["model"][name]
        section["visible"] = {}
        # Of one task there is nothing to tell.
        section["losses"]["mutual_information"] = 0.0
    if task:
        sections["model"]["tasks"] = {task: sections["model"]["tasks"][task]}
        _only(sections["data"], task)
        train = sections["train"]
        train["tasks"] = {name: value for name, value in train.get("tasks", {}).items() if name == task}
    sections["train"]["freeze"], sections["train"]["finetune"] = [], None
    parallel_for(sections, counts)
    return sections


def _only(data: dict[str, Any], task: str) -> None:
    """Sources of the task alone; of a model with one task they need not say so."""
    for key in ("sources", "valid"):
        if data.get(key):
            data[key] = [source for source in data[key] if source.get("task") in (task, None)]


def _indices(model: Model, task: str, kept: dict[str, Kept]) -> dict[str, list[tuple[int, Tensor]]]:
    """By parameter: what stays of it, as (dimension, indices)."""
    found: dict[str, list[tuple[int, Tensor]]] = {}
    names = list(model.config.task_names)
    row = torch.tensor([names.index(task)])
    for mixture in mixtures(model):
        experts = torch.tensor(kept[mixture.name].experts)
        behind = torch.arange(mixture.num_full, mixture.num_experts)
        found |= {name: [(0, experts)] for name in mixture.stacked}
        found |= {name: [(dim, torch.cat([experts, behind]))] for name, dim in mixture.gates()}
        if mixture.router.settings.per_task:
            found[f"{mixture.name}.router.weight"].append((0, row))
    found |= {name: [(0, row)] for name in PER_TASK}
    return found
