"""One model on many ranks: every technique in one visible order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from triptych import models
from triptych.models.config import ModelConfig
from triptych.parallel.collectives import Axis
from triptych.parallel.config import ParallelConfig
from triptych.parallel.data import apply_data_sharding
from triptych.parallel.expert import (
    apply_expert_parallel,
    build_expert_mesh,
    data_axis,
    tell_global_batch,
)
from triptych.parallel.freezing import freeze
from triptych.parallel.layout import Layout
from triptych.parallel.model import ParallelModel
from triptych.parallel.pipeline import Pipeline, cut_stages
from triptych.parallel.recompute import apply_recompute
from triptych.parallel.shards import local_part, window
from triptych.parallel.tensor import apply_tensor_parallel


def parallelize(
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    seq_len: int,
    micro_batch_size: int,
    num_micro_batches: int,
    autocast_dtype: torch.dtype | None = None,
    frozen: Sequence[str] = (),
) -> ParallelModel:
    """Build this rank's part of a model and initialise it, as a function of (seed, name, element) only.

    mesh: of `build_mesh`. dtype: of parameters and their gradients. autocast_dtype: of matmuls (bfloat16)
    over fp32 parameters; None: dtype. frozen: what is not trained (parallel/freezing.py). seq_len in tokens,
    micro_batch_size in samples. Nothing is allocated before it is cut. Raises ValueError for what
    `Layout.check` refuses.
    """
    layout = Layout(parallel_config)
    layout.check(
        model_config,
        seq_len=seq_len,
        global_batch_size=micro_batch_size * num_micro_batches * layout.dp_size,
        micro_batch_size=micro_batch_size,
    )
    pp, tp = mesh["pp"], Axis.of(mesh["tp"])
    sequence_parallel = parallel_config.sequence_parallel and tp.size > 1

    # 1. pipeline: only this stage is built, without storage
    stage, stages = pp.get_local_rank(), cut_stages(model_config, pp.size(), seq_len)
    first, last = stage == 0, stage == pp.size() - 1
    with torch.device("meta"):
        module = models.build(model_config, layers=stages[stage], first=first, last=last).to(dtype)
    # 2. tensor and sequence
    apply_tensor_parallel(
        module,
        tp,
        sequence_parallel=sequence_parallel,
        regather=parallel_config.recompute != "full",
        experts_aside=parallel_config.ep > 1,
    )
    # 3. experts
    expert_mesh = None
    if parallel_config.ep > 1:
        expert_mesh = build_expert_mesh(parallel_config, device.type)
        apply_expert_parallel(module, Axis.of(expert_mesh["ep"]), tp, expert_mesh)
        expert_mesh = expert_mesh["expert_replicate", "expert_shard"]
    tell_global_batch(module, data_axis(mesh))
    # 4. recomputation
    apply_recompute(module, parallel_config.recompute)
    if autocast_dtype is not None:
        _autocast_forward(module, device, autocast_dtype)
    _return_no_view(module)
    freeze(module, frozen)
    # 5. data sharding; a pipeline stage keeps its whole parameters from one micro-batch to the next
    apply_data_sharding(
        module,
        mesh["dp_replicate", "dp_shard"],
        reshard_after_forward=pp.size() == 1,
        expert_mesh=expert_mesh,
    )
    # 6. storage and values
    module.to_empty(device=device)
    models.initialize(module, seed, local_window=_local_window)

    pipeline = None
    if pp.size() > 1:
        pipeline = Pipeline(
            module,
            stages=stages,
            group=pp.get_group(),
            device=device,
            sequence_shards=tp.size if sequence_parallel else 1,
            dtype=dtype,
        )
    return ParallelModel(module, layout, mesh, device, pipeline, frozen)


def _local_window(
    name: str, parameter: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """models.init.LocalWindow of a sharded parameter."""
    held, local = window(parameter), local_part(parameter)
    assert tuple(local.shape) == held.shape, f"{name}: {tuple(local.shape)} is held where {held} was expected"
    return local, held.offset, held.global_shape


def _autocast_forward(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Around forward alone: backward's matmuls take their dtypes from what forward saved."""
    module.forward = torch.autocast(device.type, dtype)(module.forward)


def _return_no_view(module: nn.Module) -> None:
    """FSDP2 hangs its backward on the output, the pipeline detaches it in place; neither works on a view."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(part.clone() if part._is_view() else part for part in output)
        return output.clone() if output._is_view() else output

    module.forward = wrapped
