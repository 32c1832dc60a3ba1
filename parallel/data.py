"""Data sharding with FSDP2: parameters, gradients and optimizer states cut over dp_shard, copied over
dp_replicate."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from triptych.models import Model


def apply_data_sharding(model: Model, mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """Shard each block, and what remains with the model, over a (dp_replicate, dp_shard) mesh of more than 1.

    Gradients are summed over the ranks, never averaged: the loss is a share of the global batch's already.
    reshard_after_forward: free a block's whole parameters after forward and gather them again for backward.
    """
    if mesh.size() == 1:
        return
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # A factor of its own makes FSDP2 ask for a scaled sum, which gloo does not know.
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose parameters FSDP2 manages."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))
