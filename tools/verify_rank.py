"""What one rank of `verify` does: train some steps, and hold what it has against the single process's files.

The single process leaves its gradients and parameters in files; each rank reads the windows it holds itself,
so that no whole tensor travels between processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from triptych.models import ModelConfig, fill, init_table
from triptych.models.init import ZEROS, Normal
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import Layout, build_mesh
from triptych.parallel.model import ParallelModel
from triptych.parallel.parallelize import parallelize
from triptych.parallel.shards import local_part, window
from triptych.training.config import TrainConfig
from triptych.training.evaluation import MicroBatchLoss, global_counts, global_sums, prepare
from triptych.training.objectives import Batch, Objective
from triptych.training.optimizer import AdamW
from triptych.training.schedule import factor

# A tensor whose elements are all far below the largest ones of the model holds little but rounding (a bias
# that softmax ignores, say), and its relative difference says nothing: differences are measured against its
# own largest element or this share of the model's, whichever is more.
FLOOR = 1e-6
DISTURBANCE = 0.02
GRADIENTS, PARAMETERS = "gradients.safetensors", "parameters.safetensors"


@dataclass(frozen=True)
class Job:
    """One layout to train; the same for every rank of it."""

    model: ModelConfig
    parallel: ParallelConfig
    train: TrainConfig
    objective: Objective
    seq_len: int
    samples: list[Batch]
    """The global batch of each step."""
    folder: str
    """Where the single process's files are."""


@dataclass(frozen=True)
class Worst:
    """The largest difference within some tensor: relative to its scale, and absolute."""

    name: str
    relative: float
    absolute: float


@dataclass(frozen=True)
class RankResult:
    """What a rank reports. Of the reference, `absolute` is the largest element of each tensor."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Worst]
    parameters: dict[str, Worst]


def run_rank(job: Job, reference: RankResult | None) -> RankResult:
    """Train a step per global batch in float64; `reference` is None in the single process, which writes the
    files."""
    layout = Layout(job.parallel)
    dp_rank = layout.dp_rank(dist.get_rank())
    per_rank = job.train.global_batch_size // layout.dp_size
    model = parallelize(
        job.model,
        job.parallel,
        mesh=build_mesh(layout, "cpu"),
        device=torch.device("cpu"),
        dtype=torch.float64,
        seed=job.train.seed,
        seq_len=job.seq_len,
        micro_batch_size=job.train.micro_batch_size,
        num_micro_batches=per_rank // job.train.micro_batch_size,
        frozen=job.train.freeze,
    )
    disturb_zeros(model, job.train.seed)
    optimizer = AdamW(
        model.named_parameters(),
        job.train.optimizer,
        num_blocks=job.model.num_layers,
        frozen=job.train.freeze,
    )
    losses, grad_norms = [], []
    gradients: dict[str, Worst] = {}
    for step, samples in enumerate(job.samples, 1):
        mine = range(dp_rank * per_rank, (dp_rank + 1) * per_rank)
        batches = micro_batches(samples, mine, job.train.micro_batch_size)
        batches = prepare(job.objective, batches, step, training=True)
        losses.append(forward_backward(model, job.objective, batches, dp_rank))
        grad_norms.append(float(model.grad_norm()))
        if step == 1:
            gradients = compare(
                windows(model, lambda p: p.grad), Path(job.folder) / GRADIENTS, reference, "gradients"
            )
        update(model, optimizer, job.train, step, grad_norms[-1])
    parameters = compare(windows(model, lambda p: p), Path(job.folder) / PARAMETERS, reference, "parameters")
    return RankResult(losses, grad_norms, gradients, parameters)


def disturb_zeros(model: ParallelModel, seed: int) -> None:
    """Give what starts at zero small values, so that no gradient vanishes behind a gate or head of zeros."""
    table = init_table(model.module)
    for shard in model.shards():
        if table[shard.name] == ZEROS:
            noise = Normal(DISTURBANCE)
            fill(shard.tensor, noise, seed, f"verify {shard.name}", shard.offset, shard.global_shape)


def forward_backward(model: ParallelModel, objective: Objective, batches: list[Batch], dp_rank: int) -> float:
    """Gradients of the mean loss over the global batch, summed over ranks; returns that loss."""
    counts = global_counts(model, objective, batches)
    function = MicroBatchLoss(objective, counts, torch.device("cpu"))
    local = model.forward_backward(batches, function)
    model.reduce_gradients()
    return global_sums(model, function, local, dp_rank, model.layout.dp_size).loss


def update(model: ParallelModel, optimizer: AdamW, train: TrainConfig, step: int, grad_norm: float) -> None:
    """Clip as the run would, and step the optimizer at the run's learning rate."""
    limit = train.max_grad_norm
    if limit is not None and grad_norm > limit:
        model.scale_gradients(limit / grad_norm)
    model.update_routers()
    optimizer.step(train.optimizer.lr * factor(train.schedule, min(step, train.steps), train.steps))
    model.zero_grad()


def micro_batches(samples: Batch, indices: range, size: int) -> list[Batch]:
    """Samples `indices` of a global batch in parts of `size`."""
    return [
        {key: value[first : first + size] for key, value in samples.items()}
        for first in range(indices.start, indices.stop, size)
    ]


def windows(
    model: ParallelModel, of: Callable[[nn.Parameter], Tensor | None]
) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """(name, values, offset) of the part of each parameter, or of what belongs to it, that this rank holds.

    A missing gradient counts as zeros: some parameter may have no part in the loss.
    """
    for name, parameter in model.named_parameters():
        held, value = window(parameter), of(parameter)
        values = torch.zeros(held.shape, dtype=parameter.dtype) if value is None else local_part(value)
        yield name, values, held.offset


@torch.no_grad()
def compare(
    parts: Iterable[tuple[str, Tensor, tuple[int, ...]]], file: Path, reference: RankResult | None, which: str
) -> dict[str, Worst]:
    """Hold each window against the reference's file, or write that file where this is the reference."""
    if reference is None:
        whole = {name: held.detach().clone() for name, held, _ in parts}
        save_file(whole, file)
        return {name: Worst(name, 0.0, _peak(tensor)) for name, tensor in whole.items()}
    scales = {name: worst.absolute for name, worst in getattr(reference, which).items()}
    floor = FLOOR * max(scales.values())
    found = {}
    with safe_open(file, framework="pt") as expected:
        for name, held, offset in parts:
            if held.numel() == 0:
                found[name] = Worst(name, 0.0, 0.0)
                continue
            place = tuple(slice(first, first + size) for first, size in zip(offset, held.shape))
            right = expected.get_slice(name)[place] if place else expected.get_tensor(name)
            absolute = _peak(held.detach() - right)
            found[name] = Worst(name, absolute / max(scales[name], floor, 1e-300), absolute)
    return found


def _peak(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
