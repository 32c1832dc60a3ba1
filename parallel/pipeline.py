"""Pipeline parallelism: where the model is cut, and 1F1B over torch.distributed.pipelining.

Shape legend: B samples of a micro-batch, T length, M micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from triptych.models.config import ModelConfig
from triptych.models.count import build_on_meta

MicroBatch = dict[str, Any]
"""tokens, targets: int64 (B, T); document_ids: int (B, T) or None; sample_keys: int64 (B,) or None."""
LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(last stage's outputs, targets (B, T)) -> scalar: this micro-batch's share of the loss, to be summed."""


def cut_stages(config: ModelConfig, num_stages: int, seq_len: int) -> list[range]:
    """The blocks of each stage: contiguous, at least one each, with the smallest possible costliest stage.

    The cost is forward FLOPs from the real shapes; the head's count for the last stage.
    """
    if num_stages == 1:
        return [range(config.num_layers)]
    model = build_on_meta(config)
    assert model.head is not None, "a whole model has a head"
    costs = [float(block.flops(seq_len)) for block in model.blocks.values()]
    costs[-1] += float(model.head.flops(seq_len))
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
        module: nn.Module,
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        tokens_shape: tuple[int, int],
        hidden_shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> None:
        """tokens_shape: (B, T). hidden_shape, dtype: of what passes between stages (T cut under sequence
        parallelism); both are the same for every micro-batch, so that nothing is agreed upon at run time."""
        self.module = module
        self.group = group
        self.device = device
        self.stage_index = dist.get_rank(group)
        self.num_stages = dist.get_world_size(group)
        self.tokens_shape = tokens_shape
        self.hidden_shape = hidden_shape
        self.dtype = dtype
        self._schedules: dict[tuple[int, bool], Any] = {}
        self._loss_fn: LossFunction | None = None

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def run(self, micro_batches: list[MicroBatch], loss_fn: LossFunction, *, backward: bool) -> torch.Tensor:
        """Forward, and backward if asked for, of all micro-batches. The sum of their losses in the last
        stage, detached; elsewhere 0."""
        for batch in micro_batches:
            shape = tuple(batch["tokens"].shape)
            assert shape == self.tokens_shape, (
                f"a micro-batch of {shape} in a pipeline built for {self.tokens_shape}"
            )
        schedule = self._schedule(len(micro_batches), backward)
        self._loss_fn = loss_fn
        args = (_joined(micro_batches, "tokens"),) if self.is_first else ()
        kwargs = {name: _joined(micro_batches, name) for name in ("document_ids", "sample_keys")}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        losses: list[torch.Tensor] = []
        step = schedule.step if backward else schedule.eval
        if self.is_last:
            targets = _joined(micro_batches, "targets")
            step(*args, target=targets, losses=losses, return_outputs=False, **kwargs, targets=targets)
        else:
            step(*args, return_outputs=False, **kwargs)
        if not losses:
            return torch.zeros((), device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _schedule(self, num_micro_batches: int, backward: bool) -> Any:
        """1F1B for steps. GPipe for forward, and for fewer micro-batches than stages, which never reach
        1F1B's steady state. Each schedule has a stage of its own, that is, buffers of its own."""
        key = (num_micro_batches, backward)
        if key not in self._schedules:
            one_f_one_b = backward and num_micro_batches >= self.num_stages
            schedule = Schedule1F1B if one_f_one_b else ScheduleGPipe
            self._schedules[key] = schedule(
                self._stage(), num_micro_batches, loss_fn=self._compute_loss, scale_grads=False
            )
        return self._schedules[key]

    def _stage(self) -> PipelineStage:
        tokens = torch.empty(self.tokens_shape, dtype=torch.int64, device="meta")
        hidden = torch.empty(self.hidden_shape, dtype=self.dtype, device="meta", requires_grad=True)
        nll = torch.empty(self.tokens_shape, dtype=self.dtype, device="meta", requires_grad=True)
        return PipelineStage(
            self.module,
            self.stage_index,
            self.num_stages,
            self.device,
            input_args=tokens if self.is_first else hidden,
            output_args=nll if self.is_last else hidden,
            group=self.group,
        )

    def _compute_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert self._loss_fn is not None, "run() sets the loss before any schedule calls it"
        return self._loss_fn(outputs, targets)


def _joined(micro_batches: list[MicroBatch], name: str) -> torch.Tensor | None:
    """(M * B, ...), which the schedule splits into M again; None where no micro-batch has it."""
    values: list[Any] = [batch.get(name) for batch in micro_batches]
    if all(value is None for value in values):
        return None
    if name == "document_ids":
        # Without ids each row is one document, which equal ids say as well.
        tokens = [batch["tokens"] for batch in micro_batches]
        values = [torch.zeros_like(t) if value is None else value for t, value in zip(tokens, values)]
    missing = [place for place, value in enumerate(values) if value is None]
    assert not missing, f"micro-batches {missing} have no {name}, and others have"
    return torch.cat(values)
