"""What the training loop holds: a model that runs the same step under every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from triptych.models import Model
from triptych.parallel.data import sharded_modules
from triptych.parallel.expert import has_experts, looks_ahead, routers
from triptych.parallel.freezing import mask_frozen_rows
from triptych.parallel.layout import Layout
from triptych.parallel.pipeline import LossFunction, MicroBatch, Pipeline
from triptych.parallel.shards import ShardInfo, is_writer, local_part, window


class ParallelModel:
    """This rank's part of a model. What runs, sums or gathers is called by all ranks at once."""

    def __init__(
        self,
        module: Model,
        layout: Layout,
        mesh: DeviceMesh,
        device: torch.device,
        pipeline: Pipeline | None,
        frozen: Sequence[str] = (),
    ) -> None:
        self.module = module
        self.layout = layout
        self.mesh = mesh
        self.device = device
        self.pipeline = pipeline
        self.frozen = tuple(frozen)
        self._tp = mesh["tp"]
        self.is_last_stage = pipeline is None or pipeline.is_last
        self._routers = routers(module)
        self._looks_ahead = looks_ahead(module.config)
        self.has_routers = has_experts(module.config)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Whole-model name -> this rank's parameter, a DTensor where anything is cut."""
        return self.module.named_parameters()

    def forward_backward(self, micro_batches: list[MicroBatch], loss_fn: LossFunction) -> torch.Tensor:
        """Add the gradients of the summed losses to `.grad`; return this rank's sum, detached.

        The sum is 0 except on the last stage. After the last micro-batch gradients are summed over data
        ranks; `reduce_gradients` must follow.
        """
        if len(micro_batches) > 1 and self._looks_ahead:
            self._look_ahead(micro_batches)
        try:
            return self._forward_backward(micro_batches, loss_fn)
        finally:
            for router in self._routers.values():
                router.ahead = None

    def _forward_backward(self, micro_batches: list[MicroBatch], loss_fn: LossFunction) -> torch.Tensor:
        if self.pipeline is not None:
            return self.pipeline.run(micro_batches, loss_fn, backward=True)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            for module in sharded_modules(self.module):
                module.set_requires_gradient_sync(last, recurse=False)
                module.set_is_last_backward(last)
            loss = self._loss(batch, loss_fn)
            loss.backward()
            total = total + loss.detach()
        return total

    @torch.no_grad()
    def _look_ahead(self, micro_batches: list[MicroBatch]) -> None:
        """A pass without gradients, after which routers know the sums over the global batch, on which the
        gradients of their losses depend."""
        before = {name: router.record for name, router in self._routers.items()}
        for router in self._routers.values():
            router.collecting, router.record = True, None
        if self.pipeline is not None:
            self.pipeline.run(micro_batches, lambda outputs, targets: torch.zeros(()), backward=False)
        else:
            for batch in micro_batches:
                self._call(batch)
        for module in sharded_modules(self.module):
            module.reshard()
        for name, record in self._global_records().items():
            router = self._routers[name]
            router.ahead, router.collecting, router.record = record, False, before[name]

    def _global_records(self) -> dict[str, torch.Tensor]:
        """Take the records of this stage's routers, summed over the data ranks; all in one all-reduce."""
        if not self._routers:
            return {}
        records = [router.take_record() for router in self._routers.values()]
        batch = next(iter(self._routers.values())).batch
        summed = batch.sum(torch.cat(records)).split([len(record) for record in records])
        return dict(zip(self._routers, summed))

    @torch.no_grad()
    def update_routers(self, move: bool = True) -> dict[str, torch.Tensor]:
        """What the routers of this stage recorded of the step's global batch, by name.

        move: also move the biases that even out the experts' load.
        """
        records = self._global_records()
        for name, record in records.items() if move else ():
            bias, step_E = self._routers[name].expert_bias, self._routers[name].bias_step(record)
            if step_E is not None:
                local_part(bias).add_(step_E[window(bias).slices])
        return records

    def router_figures(self, records: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """What the records of `update_routers` say, by router."""
        return {name: self._routers[name].figures(record) for name, record in records.items()}

    @torch.no_grad()
    def forward(self, micro_batches: list[MicroBatch], loss_fn: LossFunction) -> torch.Tensor:
        """The summed losses without gradients and without dropout; 0 except on the last stage."""
        with self._evaluating():
            if self.pipeline is not None:
                return self.pipeline.run(micro_batches, loss_fn, backward=False)
            total = torch.zeros((), device=self.device)
            for batch in micro_batches:
                total = total + self._loss(batch, loss_fn)
            return total

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)
            # FSDP2 leaves to backward what it keeps whole after forward, and here none follows.
            for module in sharded_modules(self.module):
                module.reshard()

    def _loss(self, batch: MicroBatch, loss_fn: LossFunction) -> torch.Tensor:
        return loss_fn(self._call(batch), batch["targets"])

    def _call(self, batch: MicroBatch) -> Any:
        keywords = self.module.keywords(batch)
        if self.module.targets_inside and "targets" in batch:
            keywords["targets"] = batch["targets"]
        return self.module(batch[self.module.main_input], **keywords)

    @torch.no_grad()
    def predict(self, batch: MicroBatch) -> Any:
        """The outputs for one batch without targets, in eval mode; the same on the ranks of a data rank."""
        with self._evaluating():
            return self._call(batch) if self.pipeline is None else self.pipeline.predict(batch)

    def reduce_gradients(self) -> None:
        """Complete the gradients: sums over tp, and nothing for frozen rows."""
        self._sum_partial()
        mask_frozen_rows(self.named_parameters(), self.frozen)

    def _sum_partial(self) -> None:
        """Sum over tp the gradients to which each of its ranks contributed a part; all in one all-reduce.

        With data sharding FSDP2 has done it in backward, and nothing is left here.
        """
        partial = [
            (parameter, parameter.grad)
            for _, parameter in self.named_parameters()
            if isinstance(parameter.grad, DTensor) and any(p.is_partial() for p in parameter.grad.placements)
        ]
        if not partial:
            return
        locals_ = [local_part(gradient) for _, gradient in partial]
        buffer = torch.cat([local.flatten() for local in locals_])
        dist.all_reduce(buffer, group=self._tp.get_group())
        for (parameter, _), flat in zip(partial, buffer.split([local.numel() for local in locals_])):
            gradient = parameter.grad
            assert isinstance(gradient, DTensor), "chosen above"
            summed = [Replicate() if each.is_partial() else each for each in gradient.placements]
            parameter.grad = DTensor.from_local(
                flat.view(local_part(gradient).shape),
                gradient.device_mesh,
                summed,
                run_check=False,
                shape=gradient.shape,
                stride=gradient.stride(),
            )

    def grad_norm(self) -> torch.Tensor:
        """The L2 norm of the whole gradient, float64, on every rank; each element counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, parameter in self.named_parameters():
            if parameter.grad is not None and is_writer(parameter):
                total += torch.linalg.vector_norm(local_part(parameter.grad), dtype=torch.float64).square()
        dist.all_reduce(total)
        return total.sqrt()

    @torch.no_grad()
    def scale_gradients(self, factor: torch.Tensor | float) -> None:
        """Multiply every gradient in place."""
        for _, parameter in self.named_parameters():
            if parameter.grad is not None:
                local = local_part(parameter.grad)
                local.mul_(factor.to(local.dtype) if isinstance(factor, torch.Tensor) else factor)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for _, parameter in self.named_parameters():
            parameter.grad = None

    def shards(self) -> Iterator[ShardInfo]:
        """This rank's part of each parameter, in the order of `named_parameters`."""
        for name, parameter in self.named_parameters():
            held = window(parameter)
            yield ShardInfo(name, local_part(parameter), held.global_shape, held.offset, is_writer(parameter))

    @property
    def counts_outputs(self) -> bool:
        """Whether this rank, of those that see the last stage's outputs for the same samples, is the
        first."""
        return self.is_last_stage and self._tp.get_local_rank() == 0

    def sum_over_data(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over data ranks of the last stage's x, of any shape, the same on every rank.

        Sums over micro-batches become those of the global batch. What other stages pass is ignored.
        """
        total = x.detach().clone() if self.counts_outputs else torch.zeros_like(x)
        dist.all_reduce(total)
        return total

    def gather(self, of: Callable[[nn.Parameter], torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Whole tensors by name on rank 0 (elsewhere nothing), on CPU: for tests and `verify`.

        of: a parameter -> a tensor with its sharding, such as itself or its gradient; None is left out.
        """
        parts = []
        for name, parameter in self.named_parameters():
            value = of(parameter)
            if value is not None and is_writer(parameter):
                parts.append((name, window(parameter), local_part(value).cpu()))
        gathered: list = [None] * dist.get_world_size()
        dist.gather_object(parts, gathered if dist.get_rank() == 0 else None)
        whole: dict[str, torch.Tensor] = {}
        for name, held, local in (part for rank in gathered if rank for part in rank):
            tensor = whole.setdefault(name, torch.full(held.global_shape, torch.nan, dtype=local.dtype))
            tensor[held.slices] = local
        return whole
