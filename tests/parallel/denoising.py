"""What the ranks of a layout do with a denoiser besides training, and the same on one process without
parallel/.

Ranks load this file by its path: it imports nothing of tests.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych import models
from triptych.models.init import ZEROS, Normal, fill, init_table
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import Layout, build_mesh
from triptych.parallel.model import ParallelModel
from triptych.parallel.parallelize import parallelize

SEED = 5
Batch = dict[str, Any]


def disturb(
    table: dict[str, Any], parts: Iterable[tuple[str, Tensor, tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Small values where a denoiser starts with zeros; parts: (name, local values, offset, whole shape)."""
    for name, local, offset, shape in parts:
        if table[name] == ZEROS:
            fill(local, Normal(0.05), SEED, f"disturbed {name}", offset, shape)


def alone(config: models.DiffusionConfig) -> models.DiffusionModel:
    """The whole model in float64, by nothing of parallel/."""
    model = models.build(config).double()
    assert isinstance(model, models.DiffusionModel)
    models.initialize(model, SEED)
    parts = ((name, p.detach(), (0,) * p.ndim, tuple(p.shape)) for name, p in model.named_parameters())
    disturb(init_table(model), parts)
    return model


def under(
    config: models.DiffusionConfig,
    parallel: ParallelConfig,
    rows: int,
    tokens: int,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
) -> ParallelModel:
    """The same model on this rank of a layout, for micro-batches of two rows."""
    layout = Layout(parallel)
    model = parallelize(
        config,
        parallel,
        mesh=build_mesh(layout, "cpu"),
        device=torch.device("cpu"),
        dtype=dtype,
        autocast_dtype=autocast,
        seed=SEED,
        seq_len=tokens,
        micro_batch_size=2,
        num_micro_batches=rows // layout.dp_size // 2,
    )
    shards = ((s.name, s.tensor, s.offset, s.global_shape) for s in model.shards())
    disturb(init_table(model.module), shards)
    return model


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def work_alone(config: models.DiffusionConfig, batches: list[Batch]) -> dict[str, Any]:
    """For each global batch: the prediction in eval mode, the evaluated loss, the trained loss and gradient
    norm."""
    model = alone(config)
    seen: dict[str, Any] = {"predictions": [], "evaluated": [], "losses": [], "norms": []}
    for batch in batches:
        keywords = model.keywords(batch)
        model.eval()
        with torch.no_grad():
            seen["predictions"].append(model(batch["x"], **keywords))
        seen["evaluated"].append(float(squares(seen["predictions"][-1], batch["targets"])))
        model.train()
        loss = squares(model(batch["x"], **keywords), batch["targets"])
        loss.backward()
        norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        seen["losses"].append(float(loss.detach()))
        seen["norms"].append(float(torch.tensor(norms, dtype=torch.float64).norm()))
        nn.Module.zero_grad(model)
    return seen


def work_under(
    config: models.DiffusionConfig, parallel: ParallelConfig, batches: list[Batch]
) -> dict[str, Any]:
    """The same on this rank: of its own rows the predictions, and which rows those are."""
    first = batches[0]
    rows = first["x"].shape[0]
    tokens = config.num_tokens if "document_ids" not in first else first["x"].shape[1]
    model = under(config, parallel, rows, tokens)
    layout = Layout(parallel)
    seen: dict[str, Any] = {"predictions": [], "evaluated": [], "losses": [], "norms": [], "rows": []}
    for batch in batches:
        per_rank = batch["x"].shape[0] // layout.dp_size
        mine = slice(
            layout.dp_rank(dist.get_rank()) * per_rank, (layout.dp_rank(dist.get_rank()) + 1) * per_rank
        )
        whole = cut(batch, mine)
        micro_batches = [cut(whole, slice(start, start + 2)) for start in range(0, per_rank, 2)]
        seen["rows"].append((mine.start, mine.stop))
        told = {name: value for name, value in whole.items() if name != "targets"}
        seen["predictions"].append(model.predict(told))
        seen["evaluated"].append(float(model.sum_over_data(model.forward(micro_batches, squares).double())))
        loss = model.forward_backward(micro_batches, squares)
        model.reduce_gradients()
        seen["losses"].append(float(model.sum_over_data(loss.double())))
        seen["norms"].append(float(model.grad_norm()))
        model.zero_grad()
    return seen


def autocast_step(
    config: models.DiffusionConfig, parallel: ParallelConfig, tokens: int, batch: Batch, autocast: bool
) -> dict[str, Any]:
    """A training step over fp32 parameters, with matrix products in bfloat16 if asked for."""
    batch = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    rows = batch["x"].shape[0]
    dtype = torch.bfloat16 if autocast else None
    model = under(config, parallel, rows, tokens, torch.float32, dtype)
    loss = model.forward_backward(
        [cut(batch, slice(start, start + 2)) for start in range(0, rows, 2)], squares
    )
    model.reduce_gradients()
    dtypes = {p.grad.dtype for _, p in model.named_parameters() if p.grad is not None}
    predicted = model.predict({name: value for name, value in batch.items() if name != "targets"})
    return {
        "loss": float(model.sum_over_data(loss.double())),
        "norm": float(model.grad_norm()),
        "dtypes": dtypes | {predicted.dtype},
    }


def cut(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch; what is no tensor is for all."""
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in batch.items()}
