"""Data sharding with FSDP2: parameters, gradients and optimizer states cut over dp_shard, copied over
dp_replicate."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from triptych.models import Model
from triptych.parallel.expert import expert_modules


def apply_data_sharding(
    model: Model, mesh: DeviceMesh, *, reshard_after_forward: bool, expert_mesh: DeviceMesh | None = None
) -> None:
    """Shard each block, and what remains with the model, over a (dp_replicate, dp_shard) mesh of more than 1.

    expert_mesh: with expert parallelism, the (expert_replicate, expert_shard) mesh of stacked experts.

    Gradients are summed over the ranks, never averaged: the loss is a share of the global batch's already.
    reshard_after_forward: free a block's whole parameters after forward and gather them again for backward.
    """
    if mesh.size() == 1:
        return
    aside: set[nn.Parameter] = set()
    for experts in expert_modules(model).values() if expert_mesh is not None else ():
        assert expert_mesh is not None, "asked just above"
        if expert_mesh.size() > 1:
            fully_shard(experts, mesh=expert_mesh, reshard_after_forward=reshard_after_forward)
        else:
            # Tokens come from every data rank, so that gradients are whole already.
            aside |= set(experts.parameters())
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=aside)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=aside)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # A factor of its own makes FSDP2 ask for a scaled sum, which gloo does not know.
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose parameters FSDP2 manages."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))
