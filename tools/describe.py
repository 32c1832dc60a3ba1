"""What a configuration means, before anything is allocated: `triptych describe`.

Parameters and FLOPs come from the real shapes on the meta device. Activation bytes come from running each
stage's forward on fake tensors as that rank of that layout and counting what it leaves for backward
(tools/counting.py), so tensor and sequence parallelism and recomputation are taken into account as they are
built, not as a formula has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group

from triptych.models import flops_per_token, parameter_count
from triptych.parallel.layout import Layout
from triptych.parallel.pipeline import cut_stages
from triptych.tools.counting import StageSpec, count_stage
from triptych.tools.kept import total_bytes
from triptych.tools.render import bytes_text, count_text, table_of
from triptych.training.data import open_training
from triptych.training.sections import tokens_per_sample

if TYPE_CHECKING:
    from rich.console import RenderableType

    from triptych.training.sections import RunSections

# Adam's two moments, in the parameters' own precision.
MOMENTS = 2


@dataclass(frozen=True)
class BlockRow:
    """Blocks of one kind."""

    kind: str
    layers: list[int]
    parameters: int
    """Of one of them."""
    active: int
    """Of one of them: parameters that one token meets."""
    flops_per_token: float
    """Of one of them, forward."""


@dataclass(frozen=True)
class PartRow:
    """What stands outside the blocks, such as the head."""

    name: str
    parameters: int
    flops_per_token: float
    """Forward."""


@dataclass(frozen=True)
class BatchArithmetic:
    """From samples to steps and tokens."""

    global_batch_size: int
    micro_batch_size: int
    data_ranks: int
    micro_batches_per_rank: int
    seq_len: int
    tokens_per_step: int
    steps: int
    tokens: int
    samples_per_epoch: dict[str, int] | None
    """Per corpus; None where the corpora are not there (yet)."""
    epochs: dict[str, float] | None
    """How often the run goes through each corpus."""
    steps_per_epoch: float | None
    """Of the corpus that is gone through soonest."""
    corpus_note: str | None
    """Why the corpora could not be read."""


@dataclass(frozen=True)
class RankRow:
    """Where a rank stands, what it holds, and what that takes, in bytes."""

    rank: int
    coordinates: dict[str, int]
    dp_rank: int
    layers: list[int]
    ends: list[str]
    """embedding, head: what of them stands in this stage."""
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Kept for backward by one micro-batch."""
    micro_batches_in_flight: int
    """Whose activations are held at once (1F1B: the later the stage, the fewer)."""
    weight_copy_bytes: int
    """Casts of weights that one micro-batch keeps besides."""

    @property
    def total_bytes(self) -> int:
        """Weights, gradients, optimizer states, and activations in flight."""
        activations = self.micro_batches_in_flight * (self.activation_bytes + self.weight_copy_bytes)
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + activations


@dataclass(frozen=True)
class Description:
    """The numbers of one run; `.table()` for people, `.to_json()` for programs."""

    family: str
    hidden_size: int
    num_layers: int
    parameters: int
    active_parameters: int
    parts: list[PartRow]
    blocks: list[BlockRow]
    forward_flops_per_token: float
    forward_flops_per_sample: float
    train_flops_per_token: float
    """Forward and backward, without recomputation."""
    batch: BatchArithmetic
    train_flops: float
    """Of the whole run."""
    precision: str
    recompute: str
    sequence_parallel: bool
    world_size: int
    ranks: list[RankRow]

    def table(self) -> RenderableType:
        """Everything as one rich renderable."""
        return Group(self._model_table(), self._batch_table(), self._rank_table())

    def _model_table(self) -> RenderableType:
        rows: list[Sequence[object]] = []
        for block in self.blocks:
            count = len(block.layers)
            rows.append(
                [
                    f"{count} x {block.kind}",
                    _ranges(block.layers),
                    f"{count} x {block.parameters:,}",
                    f"{count} x {block.active:,}",
                    f"{count} x {count_text(block.flops_per_token)}",
                ]
            )
        rows += [
            [part.name, "", f"{part.parameters:,}", "", count_text(part.flops_per_token)]
            for part in self.parts
        ]
        rows.append([
            "all", "", f"{self.parameters:,}", f"{self.active_parameters:,}",
            count_text(self.forward_flops_per_token),
        ])  # fmt: skip
        return table_of(
            f"Model: {self.family}, hidden size {self.hidden_size}",
            ["part", "layers", "parameters", "of these active", "forward FLOPs per token"],
            rows,
            caption=f"Forward takes {count_text(self.forward_flops_per_sample)}FLOPs per sample, twice its "
            f"multiply-adds. Training takes {count_text(self.train_flops_per_token)}FLOPs per token "
            f"(forward and backward), {count_text(self.train_flops)}FLOPs in all.",
        )

    def _batch_table(self) -> RenderableType:
        batch = self.batch
        rows: list[Sequence[object]] = [
            ["samples per step", f"{batch.global_batch_size:,}"],
            [
                "made of",
                f"{batch.data_ranks} data rank(s) x {batch.micro_batches_per_rank} micro-batch(es) x "
                f"{batch.micro_batch_size} sample(s)",
            ],
            ["tokens per sample", f"{batch.seq_len:,}"],
            ["tokens per step", f"{batch.tokens_per_step:,}"],
            ["steps", f"{batch.steps:,}"],
            ["tokens in all", f"{batch.tokens:,}"],
        ]
        for name, samples in (batch.samples_per_epoch or {}).items():
            assert batch.epochs is not None, "epochs are known where samples per epoch are"
            rows.append([f"epochs of {name} ({samples:,} samples)", f"{batch.epochs[name]:.3f}"])
        if batch.steps_per_epoch is not None:
            rows.append(["steps per epoch (smallest corpus)", f"{batch.steps_per_epoch:,.1f}"])
        if batch.corpus_note is not None:
            rows.append(["epochs", f"not known: {batch.corpus_note}"])
        return table_of("Batch", ["figure", "value"], rows)

    def _rank_table(self) -> RenderableType:
        rows = [
            [
                row.rank,
                self._place(row),
                row.dp_rank,
                " ".join(filter(None, [
                    "embedding" if "embedding" in row.ends else "", _ranges(row.layers),
                    "head" if "head" in row.ends else "",
                ])),
                count_text(row.parameters),
                bytes_text(row.weight_bytes),
                bytes_text(row.gradient_bytes),
                bytes_text(row.optimizer_bytes),
                f"{row.micro_batches_in_flight} x {bytes_text(row.activation_bytes + row.weight_copy_bytes)}",
                bytes_text(row.total_bytes),
            ]
            for row in self.ranks
        ]  # fmt: skip
        columns = [
            "rank", "place", "data", "blocks", "params", "weights", "grads", "moments", "saved", "sum",
        ]  # fmt: skip
        sequence = "with" if self.sequence_parallel else "without"
        return table_of(
            f"Layout: {self.world_size} rank(s), precision {self.precision}, recompute {self.recompute}, "
            f"{sequence} sequence parallelism",
            columns,
            rows,
            caption="data: the part of the global batch. moments: of the optimizer. saved: micro-batches in "
            "flight x what autograd keeps of one, casts of weights included. Not in the sum: what operators "
            "need while they run, buffers of collectives, the allocator's own overhead.",
        )

    def _place(self, row: RankRow) -> str:
        """ "pp 0 tp 1": the rank's index along each axis that is cut."""
        cut = [axis for axis in row.coordinates if any(other.coordinates[axis] for other in self.ranks)]
        return " ".join(f"{axis} {row.coordinates[axis]}" for axis in cut) or "-"

    def to_json(self) -> dict[str, Any]:
        """The same numbers as plain JSON values."""
        found = asdict(self)
        for entry, row in zip(found["ranks"], self.ranks):
            entry["total_bytes"] = row.total_bytes
        return found


def describe(run: RunSections) -> Description:
    """Model, FLOPs, activation bytes, batch arithmetic and layout of `run`, with no weights allocated.

    Raises ValueError (key, value, mend) where the layout is illegal for the model or the batch.
    """
    layout = Layout(run.parallel)
    layout.check(
        run.model,
        seq_len=tokens_per_sample(run),
        global_batch_size=run.train.global_batch_size,
        micro_batch_size=run.train.micro_batch_size,
    )
    parameters = parameter_count(run.model)
    flops = flops_per_token(run.model, tokens_per_sample(run))
    batch = batch_arithmetic(run, layout)
    return Description(
        family=run.model.family,
        hidden_size=run.model.hidden_size,
        num_layers=run.model.num_layers,
        parameters=parameters["total"],
        active_parameters=parameters["active"],
        parts=[
            PartRow(name, size, flops["parts"].get(name, 0.0))
            for name, size in parameters["parts"].items()
            if size or flops["parts"].get(name)
        ],
        blocks=block_rows(parameters["per_block"], flops["per_block"]),
        forward_flops_per_token=flops["total"],
        forward_flops_per_sample=flops["total"] * tokens_per_sample(run),
        train_flops_per_token=3 * flops["total"],
        batch=batch,
        train_flops=3 * flops["total"] * batch.tokens,
        precision=run.train.precision,
        recompute=run.parallel.recompute,
        sequence_parallel=run.parallel.sequence_parallel and run.parallel.tp > 1,
        world_size=layout.world_size,
        ranks=rank_rows(run, layout, batch.micro_batches_per_rank),
    )


def block_rows(per_block: Sequence[dict[str, Any]], flops: dict[int, float]) -> list[BlockRow]:
    """One row per kind and size, in the order in which they first come."""
    alike: dict[Any, list[dict[str, Any]]] = {}
    for block in per_block:
        alike.setdefault((block["kind"], block["total"], flops[block["layer"]]), []).append(block)
    return [
        BlockRow(kind, [block["layer"] for block in blocks], total, blocks[0]["active"], per_token)
        for (kind, total, per_token), blocks in alike.items()
    ]


def batch_arithmetic(run: RunSections, layout: Layout) -> BatchArithmetic:
    """Samples, tokens, steps; epochs too where the corpora can be opened."""
    train, seq_len = run.train, tokens_per_sample(run)
    per_epoch: dict[str, int] | None = None
    epochs: dict[str, float] | None = None
    steps_per_epoch, note = None, None
    try:
        dataset = open_training(run)
        if not hasattr(dataset, "sources"):
            raise ValueError("the sources are streamed, and how many samples a stream has is not known")
    except ValueError as error:
        note = str(error)
    else:
        total = train.steps * train.global_batch_size
        consumed = dataset.consumed(total)
        per_epoch = {source.label: source.samples_per_epoch for source in dataset.sources}
        epochs = {name: consumed[name] / samples for name, samples in per_epoch.items()}
        steps_per_epoch = train.steps / max(epochs.values()) if max(epochs.values()) > 0 else None
    return BatchArithmetic(
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_ranks=layout.dp_size,
        micro_batches_per_rank=train.global_batch_size // (layout.dp_size * train.micro_batch_size),
        seq_len=seq_len,
        tokens_per_step=train.global_batch_size * seq_len,
        steps=train.steps,
        tokens=train.steps * train.global_batch_size * seq_len,
        samples_per_epoch=per_epoch,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        corpus_note=note,
    )


def rank_rows(run: RunSections, layout: Layout, num_micro_batches: int) -> list[RankRow]:
    """One row per rank. Stages are counted once each: ranks of a stage keep the same number of bytes."""
    stages = cut_stages(run.model, run.parallel.pp, tokens_per_sample(run))
    fp64 = run.train.precision == "fp64"
    counted = [
        count_stage(
            StageSpec(
                model=run.model,
                parallel=run.parallel,
                layers=layers,
                first=stage == 0,
                last=stage == len(stages) - 1,
                batch=run.train.micro_batch_size,
                seq_len=tokens_per_sample(run),
                images=_images_of_row(run),
                dtype=torch.float64 if fp64 else torch.float32,
                autocast=torch.bfloat16 if run.train.precision == "bf16" else None,
            )
        )
        for stage, layers in enumerate(stages)
    ]
    rows = []
    for place in layout.table():
        stage = place["pp"]
        kept, shapes, parallel = counted[stage].kept, counted[stage].parameter_shapes, run.parallel
        elements = sum(_held(shape, parallel.dp_shard, place["dp_shard"]) for shape in shapes)
        share = place["dp_shard"] // parallel.ep % parallel.expert_shard
        experts = counted[stage].expert_shapes
        elements += sum(_held(shape, parallel.expert_shard, share) for shape in experts)
        weights = elements * (8 if fp64 else 4)
        ends = {"embedding": stage == 0, "head": stage == len(stages) - 1}
        rows.append(
            RankRow(
                rank=place["rank"],
                coordinates=layout.coordinates(place["rank"]),
                dp_rank=place["dp_rank"],
                layers=list(stages[stage]),
                ends=[name for name, here in ends.items() if here],
                parameters=elements,
                weight_bytes=weights,
                gradient_bytes=weights,
                optimizer_bytes=MOMENTS * weights,
                activation_bytes=total_bytes(kept),
                micro_batches_in_flight=min(len(stages) - stage, num_micro_batches),
                weight_copy_bytes=total_bytes(kept, weights=True),
            )
        )
    return rows


def _images_of_row(run: RunSections) -> int | None:
    """The most in a packed row; None where rows are whole images or text."""
    packing = getattr(run.data, "packing", None)
    return None if packing is None else packing.max_images


def _held(shape: Sequence[int], degree: int, rank: int) -> int:
    """Elements of a tensor that FSDP2 leaves to one of `degree` ranks: it cuts dim 0 as torch.chunk does."""
    if not shape:
        return 1
    part = -(-shape[0] // degree)
    rows = min(part, max(0, shape[0] - rank * part))
    return rows * math.prod(shape[1:])


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
