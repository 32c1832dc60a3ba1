"""Small runs of a vision model with experts that the tests of training share, on digits of three tasks.

Ranks in processes of their own load this file by its path, so it imports nothing from `tests`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triptych.data_pipeline.images.digits import build_digits
from triptych.data_pipeline.images.options import DigitsOptions
from triptych.launcher.config import RunConfig
from triptych.parallel.shards import local_part
from triptych.training.metrics import StepReport
from triptych.training.session import Session, build

CPU = torch.device("cpu")
KINDS = {"digits": "classify", "shapes": "segment", "boxes": "detect"}
EXPERTS = 4


def write_digits(directory: Path) -> Path:
    """Shards of the three tasks in directory/TASK/{train,valid}: 32 x 32 pixels, a few canvases."""
    for task, kind in KINDS.items():
        options = {"task": kind, "out": str(directory / task), "size": 32, "shards": 2}
        build_digits(DigitsOptions.model_validate({**options, "train_images": 24, "valid_images": 6}))
    return directory


def expert_run(data: Path, /, **changes: dict[str, Any]) -> RunConfig:
    """Two blocks of 16 channels on 16 tokens, an attention_moe in the first and a moe in the second, float64;
    `changes` are laid over the sections, of `model` over its subsections."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "family": "vision",
            "in_channels": 1,
            "input_size": 32,
            "patch_size": 8,
            "hidden_size": 16,
            "num_layers": 2,
            "pattern": ["attention_moe+gelu", "attention+moe"],
            "attention": {"num_heads": 2, "rope_theta": None},
            "attention_moe": {
                "num_experts": EXPERTS,
                "top_k": 2,
                "head_dim": 4,
                "bias": True,
                "per_task": True,
                "losses": {"mutual_information": 0.1},
            },
            "ffn": {"intermediate_size": 24},
            "moe": {
                "num_experts": EXPERTS,
                "top_k": 2,
                "router": "sigmoid",
                "bias_rate": 0.01,
                "expert": {"kind": "gelu", "intermediate_size": 12, "bias": True},
            },
            "init_std": 0.3,
            "task_embedding": True,
            "tasks": {
                "digits": {"kind": "classify", "num_classes": 10},
                "shapes": {"kind": "segment", "num_classes": 11, "hidden_size": 8},
                "boxes": {"kind": "detect", "num_classes": 10, "hidden_size": 8},
            },
        },
        "data": {
            "kind": "images",
            "sources": [{"path": str(data / task / "train"), "task": task} for task in KINDS],
            "valid": [{"path": str(data / task / "valid"), "task": task} for task in KINDS],
            "image_size": 32,
            "channels": 1,
        },
        "parallel": {},
        "train": {
            "steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp64",
            "optimizer": {"lr": 0.01},
            "max_skipped_steps": 0,
        },
        "checkpoint": {},
        "log": {"tensorboard": False},
        "cluster": {"use_gpu": False},
    }
    for section, values in changes.items():
        if section == "model":
            values = {key: _over(sections["model"].get(key), value) for key, value in values.items()}
        sections[section] = sections[section] | values
    return RunConfig.model_validate({"name": "experts", **sections})


def _over(old: Any, new: Any) -> Any:
    both = isinstance(old, dict) and isinstance(new, dict) and "kind" not in new
    return {**old, **new} if both else new


def start(run: RunConfig, run_dir: Path, reports: list[StepReport] | None = None) -> Session:
    """A session on this rank."""
    return build(run, run_dir=run_dir, device=CPU, report=None if reports is None else reports.append)


def fit(run: RunConfig, run_dir: Path) -> list[StepReport]:
    """Body of a rank: run; rank 0's reports."""
    reports: list[StepReport] = []
    start(run, run_dir, reports).fit()
    return reports


def step(session: Session) -> tuple[float, float]:
    """One more step: its loss and gradient norm."""
    number = session.step + 1
    loss = session.forward_backward(session.fetch(number))
    norm = session.reduce_and_clip()
    session.update(number, loss, norm)
    return loss.loss, norm


def whole_state(session: Session) -> dict[str, Tensor]:
    """On rank 0 (elsewhere nothing) parameters, both moments and averages, put together from the ranks'
    parts without any of training/shards.py's reading."""
    parts = [
        (window.name, window.global_shape, window.offset, local_part(window.tensor).clone())
        for window in _windows(session)
        if window.is_writer
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(parts, gathered if dist.get_rank() == 0 else None)
    whole: dict[str, Tensor] = {}
    for name, shape, offset, local in (part for rank in gathered if rank for part in rank):
        tensor = whole.setdefault(name, torch.full(shape, torch.nan, dtype=local.dtype))
        tensor[tuple(slice(at, at + size) for at, size in zip(offset, local.shape))] = local
    return whole


def _windows(session: Session) -> Iterator[Any]:
    yield from session.model.shards()
    yield from session.optimizer.shards(session.model.shards())
    if session.ema is not None:
        yield from session.ema.shards(session.model.shards())


def train_and_save(
    run: RunConfig, run_dir: Path, steps: int
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Body of a rank: so many steps and a checkpoint; its state, loss and norm of the step after."""
    session = start(run, run_dir)
    for _ in range(steps):
        step(session)
    session.save(steps)
    session.checkpointer.wait()
    state = whole_state(session)
    after = step(session)
    session.close()
    return state, after


def resume_each(runs: list[RunConfig], run_dir: Path) -> list[tuple[dict[str, Tensor], tuple[float, float]]]:
    """Body of a rank: each run resumed in a directory of its own: its state, loss and norm of a step."""
    found = []
    for number, run in enumerate(runs):
        session = start(run, run_dir / str(number))
        found.append((whole_state(session), step(session)))
        session.close()
    return found


def observe(run: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Body of a rank: all steps of a run, and a validation where it has one.

    On rank 0 losses, norms and metrics of each step, gradients (before clipping) of each step, parameters
    before and after, and figures of the routers; of every rank the samples that it could not use.
    """
    session = start(run, run_dir)
    seen: dict[str, Any] = {
        name: [] for name in ("losses", "norms", "metrics", "gradients", "valid", "routing")
    }
    seen["before"] = session.model.gather(lambda parameter: parameter)
    for number in range(1, run.train.steps + 1):
        loss = session.forward_backward(session.fetch(number))
        session.model.reduce_gradients()
        # Clipping reduces once more, which finds nothing left to do.
        seen["gradients"].append(session.model.gather(lambda parameter: parameter.grad))
        norm = session.reduce_and_clip()
        session.update(number, loss, norm)
        seen["losses"].append(loss.loss)
        seen["norms"].append(norm)
        seen["metrics"].append(loss.metrics)
        seen["routing"].append(session.group.gather(session.model.router_figures(session.routing)))
    if session.validation is not None:
        session.evaluate()
        seen["valid"] = [session.valid_loss, session.valid_metrics]
    seen["after"] = session.model.gather(lambda parameter: parameter)
    seen["bad"] = session.group.gather(list(session.loader.dataset.bad.names))
    session.close()
    return seen
