"""A task more for a trained run, with experts of its own, that changes no bit of the others:
`triptych experts add-task`.

Every mixture gets experts behind those it has. The old tasks may not choose them (`visible`), and all that
the old tasks meet is frozen (`train.freeze`): what is trained are the new experts, their gates and the new
head. The new task may choose old experts as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from rich.console import Group
from rich.text import Text

from triptych import models
from triptych.data_pipeline.kinds import read_config as read_data
from triptych.models import Model, VisionConfig
from triptych.models.init import Normal
from triptych.parallel.freezing import count_trainable
from triptych.tools.experts import (
    PARAMETERS,
    Mixture,
    Source,
    check_target,
    count,
    mixtures,
    parallel_for,
    write_run,
)
from triptych.tools.render import table_of
from triptych.training.loading import averages_wanted, load_model

if TYPE_CHECKING:
    from rich.console import RenderableType

_KINDS = ("classify", "segment", "detect")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Added:
    """What adding the task did."""

    task: str
    layers: dict[str, tuple[int, int]]
    """Experts of each mixture before and after."""
    parameters_before: int
    parameters_after: int
    trained: int
    """Parameters that train.freeze leaves to be trained."""
    freeze: list[str]
    checkpoint: str | None
    """None: nothing was written."""
    config: str | None

    def table(self) -> RenderableType:
        """Before and after, then what to do next."""
        rows = [
            ["parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"],
            ["trained parameters", "", f"{self.trained:,}"],
            *([f"experts of {name}", *map(str, numbers)] for name, numbers in self.layers.items()),
        ]
        next_ = "nothing was written" if self.config is None else f"now: triptych train {self.config}"
        table = table_of(f"Task {self.task}", ["figure", "before", "after"], rows)
        return Group(table, Text(next_, no_wrap=True, overflow="ignore"))

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def add_task(
    path: str | Path,
    *,
    out: str | Path,
    task: str,
    kind: str,
    num_classes: int,
    experts: int = 4,
    data: Iterable[str] = (),
    valid: Iterable[str] = (),
    dry_run: bool = False,
) -> Added:
    """Write a run that has one task more, ready to be trained for it.

    path: a run directory or a checkpoint of a vision model with routed experts. out: the new run directory: a
    checkpoint of the extended model, which evaluates as it is, and config.yaml, a run that starts from it
    (train.finetune) and trains what is new. kind: classify, segment or detect. experts: more in each mixture.
    data, valid: shards of the new task; without data, the configuration keeps the old tasks' sources, and
    data.sources must be set before training. dry_run: write nothing.

    New experts and the head have the initial values of `models.init`. So have the new task's gates, where
    tasks have gates of their own, with model.init_std: zeros would tie, and ties go to the first experts.
    Raises ValueError for a run, name or target that cannot serve.
    """
    target, source = check_target(out), Source.open(path)
    config, averages = models.read_config(source.sections["model"]), averages_wanted(source.directory, None)
    if not isinstance(config, VisionConfig):
        raise ValueError(
            f"{path} is of model.family={config.family}, which has no tasks; add-task is for vision"
        )
    _check_request(config, task, kind, num_classes, experts)
    precise = source.sections["train"]["precision"] == "fp64"
    dtype = torch.float64 if precise else torch.float32
    old, _, _ = load_model(source.directory, torch.device("cpu"), dtype, averages)
    sections = _sections(source.sections, old, task, {"kind": kind, "num_classes": num_classes}, experts)
    _name_data(sections["data"], config.task_names, task, list(data), list(valid))
    extended = models.build(models.read_config(sections["model"])).to(dtype)
    _check_grown(old, extended, experts)
    freeze = freeze_patterns(_shapes(old), _shapes(extended))
    sections["train"] |= {"freeze": freeze, "finetune": {"checkpoint": str(target.resolve())}}
    before = {mixture.name: mixture.num_experts for mixture in mixtures(old)}
    report = Added(
        task=task,
        layers={name: (number, number + experts) for name, number in before.items()},
        parameters_before=count(old),
        parameters_after=count(extended),
        trained=count_trainable(extended.config, freeze)[0],
        freeze=freeze,
        checkpoint=None,
        config=None,
    )
    if dry_run:
        return report
    fill_extended(old, extended, int(sections["train"]["seed"]))
    tensors = {PARAMETERS + name: parameter.detach() for name, parameter in extended.named_parameters()}
    checkpoint = write_run(target, source, sections, tensors, "triptych experts add-task")
    return Added(**{**vars(report), "checkpoint": str(checkpoint), "config": str(target / "config.yaml")})


@torch.no_grad()
def fill_extended(old: Model, extended: Model, seed: int) -> None:
    """The old values in front, initial values behind them."""
    models.initialize(extended, seed)
    values = dict(old.named_parameters())
    tasks = len(old.config.task_names)
    for mixture in mixtures(extended):
        name, weight = f"{mixture.name}.router.weight", mixture.router.weight
        if mixture.router.settings.per_task:
            std = Normal(extended.config.init_std)
            models.fill(weight[tasks:], std, seed, name, (tasks, 0, 0), tuple(weight.shape))
    for name, parameter in extended.named_parameters():
        if name in values:
            parameter[tuple(slice(0, size) for size in values[name].shape)] = values[name]


def freeze_patterns(old: Mapping[str, tuple[int, ...]], new: Mapping[str, tuple[int, ...]]) -> list[str]:
    """`train.freeze` of everything that was there before: what has grown by its rows, the rest by globs.

    old, new: shapes by name. What is only in new is trained.
    """
    whole = [name for name, shape in new.items() if old.get(name) == shape]
    rows = [f"{name}[0:{old[name][0]}]" for name, shape in new.items() if name in old and old[name] != shape]
    return [*_globs(whole, [name for name in new if name not in set(whole)]), *rows]


def _globs(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names and globs "prefix.*" that match all of wanted and none of the others, as short as can be."""
    others = list(others)
    found: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        prefixes = [".".join(parts[:depth]) + "." for depth in range(1, len(parts))]
        free = (prefix for prefix in prefixes if not any(other.startswith(prefix) for other in others))
        prefix = next(free, None)
        found[name if prefix is None else f"{prefix}*"] = None
    return list(found)


def _check_request(config: VisionConfig, task: str, kind: str, num_classes: int, experts: int) -> None:
    if task in config.tasks:
        raise ValueError(f"--task {task}: the model has this task already, beside {', '.join(config.tasks)}")
    if not _NAME.fullmatch(task):
        raise ValueError(f"--task {task}: give a name of letters, digits, _ and -, beginning with a letter")
    if kind not in _KINDS:
        raise ValueError(f"--kind {kind} is unknown; use {', '.join(_KINDS)}")
    for name, number in (("--num-classes", num_classes), ("--experts", experts)):
        if number < 1:
            raise ValueError(f"{name}={number}: give 1 or more")


def _sections(
    sections: dict[str, Any], old: Model, task: str, head: dict[str, Any], experts: int
) -> dict[str, Any]:
    """The configuration with the task and its experts."""
    model = sections["model"]
    found = mixtures(old)
    for name in ("moe", "attention_moe"):
        mine = [mixture for mixture in found if mixture.section == name]
        if mine:
            model[name] |= _grown(model[name], mine, old.config.task_names, experts)
    model["tasks"] = {**model["tasks"], task: head}
    parallel_for(sections, [mixture.num_full + experts for mixture in found])
    return sections


def _grown(
    section: dict[str, Any], found: list[Mixture], tasks: Iterable[str], experts: int
) -> dict[str, Any]:
    """Keys of model.moe or model.attention_moe that change."""
    key = f"model.{found[0].section}"
    counts = {mixture.num_experts for mixture in found}
    if len(counts) > 1:
        raise ValueError(
            f"{key}.num_experts_of: layers have {', '.join(map(str, sorted(counts)))} experts, and `visible` "
            "is one number for all of them; add the task before pruning"
        )
    if section["router"] == "expert_choice":
        raise ValueError(
            f"{key}.router=expert_choice: how many tokens an expert takes depends on the number of experts, "
            "so that new ones would change the old tasks' outputs; train with softmax, noisy or sigmoid"
        )
    if section.get("low_rank") or section.get("identity"):
        raise ValueError(
            f"{key}.low_rank={section['low_rank']}, identity={section['identity']}: such experts are "
            "numbered behind the full ones, where new ones would have to stand; train with full experts alone"
        )
    (number,) = counts
    changed: dict[str, Any] = {
        "num_experts": number + experts,
        "num_experts_of": {},
        "visible": {name: section["visible"].get(name, number) for name in tasks},
    }
    if section["router"] == "sigmoid":
        # The bias moves without a gradient, so that freezing does not hold it.
        changed["bias_rate"] = 0.0
    return changed


def _check_grown(old: Model, extended: Model, experts: int) -> None:
    """What the configuration builds is what is to be filled."""
    before = {mixture.name: mixture.num_experts for mixture in mixtures(old)}
    for mixture in mixtures(extended):
        wanted = before[mixture.name] + experts
        if mixture.num_experts != wanted:
            raise ValueError(
                f"{mixture.name} would have {mixture.num_experts} experts in place of {wanted}: model.stages "
                "must not set num_experts, num_experts_of or visible; put them under model"
            )


def _name_data(
    data: dict[str, Any], tasks: tuple[str, ...], task: str, train: list[str], valid: list[str]
) -> None:
    """New sources in place of the old ones, which train nothing; validation data of all tasks."""
    for key in ("sources", "valid"):
        for source in data.get(key) or ():
            # With one task sources need not say that they are for it; with two they must.
            source["task"] = source.get("task") or tasks[0]
    if train:
        data["sources"] = [{"path": path, "task": task} for path in train]
    if valid:
        data["valid"] = [*(data.get("valid") or ()), *({"path": path, "task": task} for path in valid)]
    try:
        read_data(data)
    except ValidationError as error:
        raise ValueError("; ".join(found["msg"] for found in error.errors())) from error


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
