"""A stage of a model as one rank of a layout holds it, with no storage behind its tensors.

Fake tensors carry shapes, dtypes and a device but no memory, and a fake process group answers collectives
with nothing, so one process can run forward as any rank of any layout, autocast included, and count what it
keeps.

B batch (one micro-batch), T length of the whole sequence, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from triptych.models import DiffusionConfig, LanguageConfig, Model, VisionConfig, build
from triptych.parallel.collectives import Axis
from triptych.parallel.config import ParallelConfig
from triptych.parallel.expert import apply_expert_parallel, expert_modules
from triptych.parallel.recompute import apply_recompute
from triptych.parallel.shards import local_part
from triptych.parallel.tensor import apply_tensor_parallel
from triptych.tools.kept import Kept, kept_by_backward
from triptych.tools.vision_batches import vision_batch


@dataclass(frozen=True)
class StageSpec:
    """What to build, and what to run through it."""

    model: LanguageConfig | DiffusionConfig | VisionConfig
    parallel: ParallelConfig
    """Only tp, ep, sequence_parallel and recompute matter: data parallelism keeps the same, and a pipeline's
    stages are counted one by one."""
    layers: range
    first: bool
    last: bool
    batch: int
    """Samples of one micro-batch, B."""
    seq_len: int
    """Tokens of one sample, T."""
    dtype: torch.dtype = torch.float32
    """Of parameters and of hidden states between stages."""
    autocast: torch.dtype | None = None
    """Of matrix products, where it differs from dtype."""
    images: int | None = None
    """Images that a row of packed ones may hold; None: whole images."""


@dataclass(frozen=True)
class StageCount:
    """What a tp rank of a stage holds."""

    kept: list[Kept]
    """Storages that one micro-batch keeps for backward."""
    parameter_shapes: list[tuple[int, ...]]
    """Of the rank's own part of each parameter, before data sharding."""
    expert_shapes: list[tuple[int, ...]]
    """Likewise of what is stacked over experts under expert parallelism, which fewer ranks share."""


def count_stage(spec: StageSpec, rank: int = 0) -> StageCount:
    """Count on the tp rank `rank`; nothing is allocated."""
    with fake_axis(spec.parallel.tp, rank) as axis, FakeTensorMode(allow_non_fake_inputs=True):
        return count_stage_on(spec, axis)


def count_stage_on(spec: StageSpec, axis: Axis) -> StageCount:
    """The same on whatever tensors the process makes: fake ones, or real ones of a rank of a real group."""
    model = build_stage(spec, axis)
    kept = kept_by_backward(model, lambda: stage_forward(spec, model))
    stacked = expert_modules(model).values() if spec.parallel.ep > 1 else ()
    experts = {id(parameter) for module in stacked for parameter in module.parameters()}
    shapes = {id(parameter): tuple(local_part(parameter).shape) for parameter in model.parameters()}
    return StageCount(
        kept,
        parameter_shapes=[shape for key, shape in shapes.items() if key not in experts],
        expert_shapes=[shape for key, shape in shapes.items() if key in experts],
    )


def build_stage(spec: StageSpec, axis: Axis) -> Model:
    """The stage, cut and wrapped in the order of parallel/parallelize.py."""
    with default_dtype(spec.dtype):
        model = build(spec.model, spec.layers, first=spec.first, last=spec.last)
    apply_tensor_parallel(
        model,
        axis,
        sequence_parallel=spec.parallel.sequence_parallel,
        regather=spec.parallel.recompute != "full",
        experts_aside=spec.parallel.ep > 1,
    )
    apply_expert_parallel(model, Axis(spec.parallel.ep), axis)
    apply_recompute(model, spec.parallel.recompute)
    return model


def stage_forward(spec: StageSpec, model: Model) -> Any:
    """Forward of one micro-batch made here; the values mean nothing."""
    batch = example_batch(spec)
    inputs = [batch[model.main_input]]
    if not spec.first:
        shards = spec.parallel.tp if spec.parallel.sequence_parallel else 1
        config: Any = spec.model
        shapes = model.between(config, batch, spec.layers.start, shards)
        inputs = [torch.zeros(shape, dtype=spec.dtype).requires_grad_() for shape in shapes]
    keywords = model.keywords(batch)
    if spec.last and model.targets_inside:
        keywords["targets"] = batch["targets"]
    cast = torch.autocast("cpu", spec.autocast) if spec.autocast is not None else nullcontext()
    with cast:
        return model(*inputs, **keywords)


def example_batch(spec: StageSpec) -> dict[str, Tensor]:
    """A micro-batch of zeros."""
    size_b, size_t, model = spec.batch, spec.seq_len, spec.model
    batch = {"sample_keys": torch.zeros(size_b, dtype=torch.int64)}
    if isinstance(model, LanguageConfig):
        batch["tokens"] = batch["targets"] = torch.zeros(size_b, size_t, dtype=torch.int64)
        return batch
    if isinstance(model, VisionConfig) and spec.images is None:
        shape = (model.in_channels, *model.input_size)
        return vision_batch(model, shape, size_b, torch.Generator(), spec.dtype)
    per_image: tuple[int, ...] = (size_b,)
    if spec.images is not None:
        per_image = (size_b, spec.images)
        axes = len(model.input_size)
        batch["positions"] = torch.zeros(size_b, size_t, axes, dtype=torch.int64)
        batch["document_ids"] = torch.zeros(size_b, size_t, dtype=torch.int64)
        batch["sizes"] = torch.zeros(*per_image, axes, dtype=torch.int64)
        values = model.in_channels * model.patch_elements
        batch["x"] = torch.zeros(size_b, size_t, values, dtype=spec.dtype)
    else:
        assert isinstance(model, DiffusionConfig), "whole images of vision models are made above"
        fits = size_t == model.num_tokens
        space = model.input_size if fits else (model.patch_size, model.patch_size * size_t)
        batch["x"] = torch.zeros(size_b, model.in_channels, *space, dtype=spec.dtype)
    if isinstance(model, VisionConfig):
        batch["tasks"] = torch.zeros(size_b, dtype=torch.int64)
        return batch
    told = model.conditioning
    batch["times"] = torch.zeros(per_image, dtype=spec.dtype)
    if told.kind == "class":
        batch["labels"] = torch.zeros(per_image, dtype=torch.int64)
    if told.kind == "text":
        batch["text"] = torch.zeros(size_b, told.text_length, told.text_size, dtype=spec.dtype)
    return batch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def fake_axis(size: int, rank: int) -> Iterator[Axis]:
    """A tp axis of `size` ranks whose collectives do nothing, seen from `rank`."""
    assert not dist.is_initialized(), (
        "counting makes a process group of its own: it runs outside of any other"
    )
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        mesh: DeviceMesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        yield Axis.of(mesh)
    finally:
        dist.destroy_process_group()
