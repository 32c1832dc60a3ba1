"""Expert parallelism: experts divided among data ranks, tokens sent to them and back.

The ep axis is folded over the data axes: the ranks of a group read different samples and hold different
experts. Dense parameters know nothing of it. A second mesh over the same ranks,
(pp, expert_replicate, expert_shard, ep, tp), places what is stacked over experts: dim 0 over ep, a further
dimension over tp, and FSDP2 shards what is left over expert_shard (`ParallelConfig`).

What routers know of a batch are sums over the global batch (`GlobalBatch`). With several micro-batches those
sums are known only after the last; a pass ahead without gradients gathers them.

Shape legend: A rows of this rank, M rows for the experts held, E experts, e experts held, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from triptych import kernels
from triptych.models.balancing import weighs
from triptych.models.config import ModelConfig
from triptych.models.context import has_values
from triptych.models.moe_config import RouterConfig
from triptych.models.sharding import REPLICATE, Exchange, GlobalBatch, Sent
from triptych.parallel.collectives import Axis, all_gather, all_reduce
from triptych.parallel.config import ParallelConfig
from triptych.parallel.layout import declared_cuts
from triptych.parallel.tensor import Use, use_of, with_local_parameters

EXPERT_AXES = ("pp", "expert_replicate", "expert_shard", "ep", "tp")


def build_expert_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    """The mesh of stacked experts, over all ranks of the default process group."""
    shape = (config.pp, config.expert_replicate, config.expert_shard, config.ep, config.tp)
    return init_device_mesh(device_type, shape, mesh_dim_names=EXPERT_AXES)


def data_axis(mesh: DeviceMesh) -> Axis:
    """The ranks that read the other samples of a global batch, in the order of the samples."""
    for alone, other in (("dp_shard", "dp_replicate"), ("dp_replicate", "dp_shard")):
        if mesh[other].size() == 1:
            return Axis.of(mesh[alone])
    return Axis.of(mesh["dp_replicate", "dp_shard"]._flatten("dp"))


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose parameters are stacked over experts, by name."""
    return {
        name: module for name, module in model.named_modules() if getattr(module, "expert_parallel", False)
    }


def routers(model: nn.Module) -> dict[str, Any]:
    """The modules that keep sums over the global batch, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "balanced", False)}


def routing_sections(config: ModelConfig) -> list[RouterConfig]:
    """The settings of the routers that the whole model has, so that the stages of a pipeline agree."""
    found: list[RouterConfig] = []
    for stage in config.stage_configs:
        specs = stage.layer_specs()
        if any(spec.ffn == "moe" for spec in specs):
            found.append(stage.moe)
        if any(spec.mixer == "attention_moe" for spec in specs):
            found.append(stage.attention_moe)
    return found


def has_experts(config: ModelConfig) -> bool:
    """Whether the model has routed experts."""
    return bool(routing_sections(config))


def looks_ahead(config: ModelConfig) -> bool:
    """Whether some router has a loss of the global batch, which several micro-batches know only together."""
    return any(weighs(section.losses) for section in routing_sections(config))


def apply_expert_parallel(model: nn.Module, ep: Axis, tp: Axis, mesh: DeviceMesh | None = None) -> None:
    """Cut stacked experts, in place, over ep and tp; nothing on an axis of one.

    model: on the meta device. mesh: of ep and tp; None to count: parameters become plain tensors of this
    rank's shapes. The number of experts of each module is a multiple of ep (`Layout.check`).
    """
    if ep.size == 1:
        return
    cuts = declared_cuts(model)
    for prefix, module in expert_modules(model).items():
        uses = {}
        for name, parameter in module.named_parameters(recurse=False):
            use = use_of(cuts.get(f"{prefix}.{name}", REPLICATE), parameter, tp, partial=True)
            over_tp = use.gradients if tp.size > 1 else ()
            uses[name] = dataclasses.replace(use, gradients=(Shard(0), *over_tp))
            module._parameters[name] = _cut(parameter, use, ep, tp, mesh)
        if mesh is not None:
            module.forward = with_local_parameters(module, uses)
        held: Any = module
        held.exchange = EpExchange(ep)


def _cut(parameter: nn.Parameter, use: Use, ep: Axis, tp: Axis, mesh: DeviceMesh | None) -> nn.Parameter:
    local = parameter.detach().chunk(ep.size, 0)[ep.rank]
    placements: list[Placement] = [Shard(0)]
    if tp.size > 1:
        if use.dim is not None:
            local = local.chunk(tp.size, use.dim)[tp.rank]
        placements.append(Replicate() if use.dim is None else Shard(use.dim))
    local = local.contiguous()
    if mesh is None:
        return nn.Parameter(local, requires_grad=parameter.requires_grad)
    placed = mesh["ep", "tp"] if tp.size > 1 else mesh["ep"]
    whole = DTensor.from_local(
        local, placed, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


class DataGlobalBatch(GlobalBatch):
    """The verbs of models/sharding.py over the data ranks."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.count, self.rank = axis, axis.size, axis.rank

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x, self.axis)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather(x, 0, self.axis)


def tell_global_batch(model: nn.Module, axis: Axis) -> None:
    """Give every module that needs the global batch the verbs over the data ranks."""
    if axis.size > 1:
        for module in model.modules():
            if isinstance(getattr(module, "batch", None), GlobalBatch):
                module.batch = DataGlobalBatch(axis)  # type: ignore[assignment]


class EpExchange(Exchange):
    """Uneven all-to-all over ep, both ways."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.count, self.rank = axis, axis.size, axis.rank

    def there(self, rows_AC: torch.Tensor, counts_E: torch.Tensor) -> Sent:
        if not has_values(rows_AC):
            # Shapes alone: as many rows come as go.
            return Sent(rows_AC, counts_E.chunk(self.count)[self.rank], lambda rows: rows)
        going_Re = counts_E.view(self.count, -1)
        coming_Re = torch.empty_like(going_Re)
        dist.all_to_all_single(coming_Re, going_Re.contiguous(), group=self.axis.group)
        sizes = torch.stack([going_Re.sum(1), coming_Re.sum(1)]).tolist()
        going, coming = list(sizes[0]), list(sizes[1])
        rows = _AllToAll.apply(rows_AC, going, coming, self.axis)
        # They come by sender, and are wanted by expert.
        held = coming_Re.shape[1]
        experts = torch.arange(held, device=rows.device).repeat(self.count)
        order = experts.repeat_interleave(coming_Re.flatten()).argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

        def back(rows_MD: torch.Tensor) -> torch.Tensor:
            by_sender = kernels.moe_gather(rows_MD, inverse, order.unsqueeze(1))
            return _AllToAll.apply(by_sender, coming, going, self.axis)

        by_expert = kernels.moe_gather(rows, order, inverse.unsqueeze(1))
        return Sent(by_expert, coming_Re.sum(0), back)


class _AllToAll(torch.autograd.Function):
    """Rows in parts of sizes `going` to the ranks, parts of sizes `coming` from them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, going: list[int], coming: list[int], axis: Axis) -> torch.Tensor:
        ctx.going, ctx.coming, ctx.axis = going, coming, axis
        y = x.new_empty(sum(coming), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), coming, going, group=axis.group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return _AllToAll.apply(grads[0], ctx.coming, ctx.going, ctx.axis), None, None, None
