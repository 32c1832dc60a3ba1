"""Pipeline parallelism: where the model is cut, and 1F1B over torch.distributed.pipelining.

Shape legend: B samples of a micro-batch, T length, M micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from triptych.models import Model, ModelConfig
from triptych.models.count import build_on_meta

MicroBatch = dict[str, Any]
"""The model's main input and keywords by name, and targets: a tensor or a dict of tensors."""
LossFunction = Callable[[Any, Any], torch.Tensor]
"""(last stage's outputs, a tensor or a tuple of tensors, and targets) -> scalar: this micro-batch's share of
the loss, to be summed."""


def cut_stages(config: ModelConfig, num_stages: int, seq_len: int) -> list[range]:
    """The blocks of each stage: contiguous, at least one each, with the smallest possible costliest stage.

    The cost is forward FLOPs from the real shapes; the head's count for the last stage.
    """
    if num_stages == 1:
        return [range(config.num_layers)]
    model = build_on_meta(config)
    assert model.exit is not None, "a whole model has its end"
    costs = [float(block.flops(config.length_at(block.layer, seq_len))) for block in model.blocks.values()]
    costs[-1] += float(model.exit.flops(seq_len))
    bounds = [0, *partition(costs, num_stages), len(costs)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def partition(costs: Sequence[float], parts: int) -> list[int]:
    """Where parts 1, 2, ... begin, so that the costliest of the contiguous parts is as cheap as can be.

    Among equals the one with the least sum of squares, so that the other parts are even too.

    >>> partition([1, 1, 1, 1, 4], 2)
    [4]
    """
    assert 1 <= parts <= len(costs), f"{len(costs)} blocks cannot fill {parts} stages"
    # best[n]: (largest part, sum of squares, starts) of the first n costs in as many parts as rounds so far.
    best = [(sum(costs[:n]), sum(costs[:n]) ** 2, [0]) for n in range(len(costs) + 1)]
    for part in range(1, parts):
        longer = list(best)
        for n in range(part + 1, len(costs) + 1):
            candidates = []
            for start in range(part, n):
                largest, squares, starts = best[start]
                last = sum(costs[start:n])
                candidates.append((max(largest, last), squares + last**2, [*starts, start]))
            longer[n] = min(candidates)
        best = longer
    return best[-1][2][1:]


class Pipeline:
    """Runs the micro-batches of a step through the stages; this rank holds one of them."""

    def __init__(
        self,
        module: Model,
        *,
        stages: Sequence[range],
        group: dist.ProcessGroup,
        device: torch.device,
        sequence_shards: int,
        dtype: torch.dtype,
    ) -> None:
        """stages: the blocks of each. sequence_shards: parts in which T is cut. dtype: of what passes between
        stages. Shapes follow from the batch, so that nothing is agreed upon at run time."""
        self.module = module
        self.stages = stages
        self.group = group
        self.device = device
        self.stage_index = dist.get_rank(group)
        self.num_stages = dist.get_world_size(group)
        self.sequence_shards = sequence_shards
        self.dtype = dtype
        self._schedules: dict[Any, Any] = {}
        self._loss_fn: LossFunction | None = None
        self._targets: list[Any] = []

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def run(self, micro_batches: list[MicroBatch], loss_fn: LossFunction, *, backward: bool) -> torch.Tensor:
        """Forward, and backward if asked for, of all micro-batches, which are alike in shape. The sum of
        their losses in the last stage, detached; elsewhere 0."""
        schedule = self._schedule(micro_batches, backward)
        self._loss_fn = loss_fn
        self._targets = [batch["targets"] for batch in micro_batches]
        step = schedule.step if backward else schedule.eval
        losses: list[torch.Tensor] = []
        args, kwargs = self._arguments(micro_batches)
        if self.is_last:
            # The schedule cuts a tensor of targets up; what it cuts here are the micro-batches' numbers.
            numbers = torch.arange(len(micro_batches))
            step(*args, target=numbers, losses=losses, return_outputs=False, **kwargs)
        else:
            step(*args, return_outputs=False, **kwargs)
        if not losses:
            return torch.zeros((), device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))
        return torch.stack([loss.detach() for loss in losses]).sum()

    def predict(self, batch: MicroBatch) -> Any:
        """The last stage's outputs of one batch without targets, on every stage."""
        schedule = self._schedule([batch], False, loss=False)
        args, kwargs = self._arguments([batch])
        output = schedule.eval(*args, **kwargs)
        if self.is_last:
            outputs = [part.contiguous() for part in (output if isinstance(output, tuple) else (output,))]
        else:
            shapes = self._shapes(batch, self.num_stages)
            outputs = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        for part in outputs:
            dist.broadcast(part, group=self.group, group_src=self.num_stages - 1)
        return tuple(outputs) if self.module.several_outputs else outputs[0]

    def _arguments(self, micro_batches: list[MicroBatch]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What this stage is called with, of all micro-batches behind each other."""
        main = torch.cat([batch[self.module.main_input] for batch in micro_batches])
        keywords = [self.module.keywords(batch) for batch in _alike(micro_batches)]
        joined = {name: _joined([found[name] for found in keywords]) for name in keywords[0]}
        if self.is_last and self.module.targets_inside and "targets" in micro_batches[0]:
            joined["targets"] = torch.cat([batch["targets"] for batch in micro_batches])
        return (main,) if self.is_first else (), joined

    def _schedule(self, micro_batches: list[MicroBatch], backward: bool, loss: bool = True) -> Any:
        """1F1B for steps. GPipe for forward, and for fewer micro-batches than stages, which never reach
        1F1B's steady state. Each schedule has a stage of its own, that is, buffers of its own."""
        count, batch = len(micro_batches), micro_batches[0]
        shapes = [self._shapes(batch, stage) for stage in range(self.num_stages + 1)]
        key = (count, backward, loss, str(shapes))
        if key not in self._schedules:
            one_f_one_b = backward and count >= self.num_stages
            schedule = Schedule1F1B if one_f_one_b else ScheduleGPipe
            function = self._compute_loss if loss else None
            self._schedules[key] = schedule(self._stage(batch), count, loss_fn=function, scale_grads=False)
        return self._schedules[key]

    def _shapes(self, batch: MicroBatch, stage: int) -> list[Any]:
        """Of what enters a stage after the first; behind the last, of the output."""
        if stage == 0:
            return [tuple(batch[self.module.main_input].shape)]
        layer = self.stages[stage - 1].stop
        config: Any = self.module.config
        return self.module.between(config, batch, layer, self.sequence_shards)

    def _stage(self, batch: MicroBatch) -> PipelineStage:
        def empty(stage: int) -> tuple[torch.Tensor, ...]:
            shapes = self._shapes(batch, stage)
            return tuple(
                torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True) for shape in shapes
            )

        main = batch[self.module.main_input]
        return PipelineStage(
            self.module,
            self.stage_index,
            self.num_stages,
            self.device,
            input_args=torch.empty_like(main, device="meta") if self.is_first else empty(self.stage_index),
            output_args=empty(self.stage_index + 1),
            group=self.group,
        )

    def _compute_loss(self, outputs: Any, number: torch.Tensor) -> torch.Tensor:
        assert self._loss_fn is not None, "run() sets the loss before any schedule calls it"
        return self._loss_fn(outputs, self._targets[int(number)])


def _alike(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """With document_ids in all where some have them: equal ids say, as their absence does, that a row is one
    document."""
    if all(batch.get("document_ids") is None for batch in micro_batches):
        return micro_batches
    return [
        batch
        if batch.get("document_ids") is not None
        else {**batch, "document_ids": torch.zeros_like(batch["tokens"])}
        for batch in micro_batches
    ]


def _joined(values: list[Any]) -> Any:
    """(M * B, ...), which the schedule splits into M again; what is no tensor is the same for all."""
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]
