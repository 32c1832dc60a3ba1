"""Mixtures of experts of a trained run: where they are, what the run said, and writing a changed one back.

`triptych experts` has three verbs: use (tools/experts_use.py), prune (tools/experts_prune.py) and add-task
(tools/experts_add.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from triptych.models import Model
from triptych.models.experts import LowRankExperts
from triptych.models.routers import Router
from triptych.training import recovery, store
from triptych.training.checkpoint import Checkpointer
from triptych.training.shards import Window

PARAMETERS = "model/"
"""Of the parameters' names in a checkpoint."""


@dataclass(frozen=True)
class Mixture:
    """One layer's mixture: a feed-forward moe or a mixer attention_moe."""

    name: str
    """Of its module, such as blocks.1.ffn."""
    layer: int
    section: Literal["moe", "attention_moe"]
    """Of the model's configuration."""
    router: Router
    num_full: int
    """Experts whose parameters are stacked in `stacked`; those behind them have low rank or none at all."""
    stacked: tuple[str, ...]
    """Names of the parameters whose dimension 0 goes over the full experts."""

    @property
    def num_experts(self) -> int:
        """Experts of all kinds."""
        return self.router.num_experts

    def gates(self) -> Iterator[tuple[str, int]]:
        """Names of the router's parameters and the dimension that goes over all experts."""
        yield f"{self.name}.router.weight", self.router.weight.ndim - 2
        if self.router.expert_bias is not None:
            yield f"{self.name}.router.expert_bias", 0


def mixtures(model: Model) -> list[Mixture]:
    """All of a model, in the order of its layers. Raises ValueError where there is none."""
    found = []
    for path, router in model.named_modules():
        if not isinstance(router, Router):
            continue
        name = path.rpartition(".")[0]
        owner = model.get_submodule(name)
        stacked = tuple(
            f"{name}.{child}.{parameter}"
            for child, module in owner.named_children()
            if getattr(module, "expert_parallel", False) and not isinstance(module, LowRankExperts)
            for parameter, _ in module.named_parameters()
        )
        section: Literal["moe", "attention_moe"] = "moe" if name.endswith(".ffn") else "attention_moe"
        full = model.get_parameter(stacked[0]).shape[0]
        found.append(Mixture(name, int(name.split(".")[1]), section, router, full, stacked))
    if not found:
        raise ValueError(
            "the model has no routed experts: no block of model.pattern has the feed-forward moe or the "
            "mixer attention_moe"
        )
    return found


def task_named(model: Model, task: str | None) -> str:
    """The task of that name; None: the only one. Raises ValueError for one that the model has not got."""
    names: tuple[str, ...] = model.config.task_names
    if task is None and len(names) == 1:
        return names[0]
    if task not in names:
        known = ", ".join(names) if any(names) else "none in this family; leave it out"
        raise ValueError(f"--task {task}: the model's tasks are {known}")
    return task


@dataclass(frozen=True)
class Source:
    """A checkpoint as it is on disk."""

    directory: Path
    state: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """The checkpoint `path`, or the newest valid one of the run directory `path`.

        Raises ValueError when there is none.
        """
        place = Path(path).expanduser()
        if not place.exists():
            raise ValueError(f"{path} does not exist; give a run directory or a checkpoint in it")
        directory = recovery.newest_in(place)
        return cls(directory, store.load_state(directory))

    @property
    def sections(self) -> dict[str, Any]:
        """The run's configuration, to be changed at will."""
        return copy.deepcopy(self.state["config"])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Whole tensors whose names begin with prefix, by the rest of their names."""
        found = {}
        with store.open_reader(self.directory) as reader:
            for name, entry in reader.index.items():
                if name.startswith(prefix):
                    dtype = torch.float64 if entry.dtype == "F64" else torch.float32
                    tensor = torch.empty(entry.shape, dtype=dtype)
                    reader.read_into(Window(name, tensor, entry.shape, (0,) * len(entry.shape)))
                    found[name.removeprefix(prefix)] = tensor
        return found


def check_target(out: str | Path) -> Path:
    """The directory to write to. Raises ValueError where a run is there already."""
    target = Path(out).expanduser()
    if target.is_file() or (target / "config.yaml").exists() or store.list_steps(target / "checkpoints"):
        raise ValueError(f"--out {out} is taken; give a new directory")
    return target


def write_run(
    out: Path, source: Source, sections: dict[str, Any], tensors: Mapping[str, Tensor], made_by: str
) -> Path:
    """Leave a run directory: config.yaml and one checkpoint, of the source's step, without moments.

    tensors: by their names in a checkpoint, such as model/norm.weight. Returns the checkpoint.
    Raises RuntimeError where it could not be written.
    """
    step = int(source.state["step"])
    state: dict[str, Any] = {
        key: source.state[key] for key in ("tokens", "seed", "versions") if key in source.state
    }
    state |= {
        "step": step,
        "config": sections,
        "meta": {"made_by": made_by, "from": str(source.directory.resolve())},
    }
    windows = [
        Window(name, tensor.contiguous(), tuple(tensor.shape), (0,) * tensor.ndim)
        for name, tensor in tensors.items()
    ]
    checkpointer = Checkpointer(out / recovery.CHECKPOINTS, async_save=False)
    checkpointer.save(step, windows, state)
    if checkpointer.failures:
        raise RuntimeError(f"the checkpoint in {out} could not be written; see the warning above")
    text = yaml.safe_dump({"name": out.resolve().name, **sections}, sort_keys=False)
    (out / "config.yaml").write_text(text, encoding="utf-8")
    return store.list_steps(out / recovery.CHECKPOINTS)[0]


def parallel_for(sections: dict[str, Any], counts: list[int]) -> None:
    """Expert parallelism that the new numbers of experts cannot be divided by goes."""
    if any(count % sections["parallel"].get("ep", 1) for count in counts):
        sections["parallel"]["ep"] = 1


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
