"""What keeps experts busy: sums of a router's decisions over the global batch, and losses that are functions
of them alone.

A loss L of global sums S = sum of S_r over ranks and micro-batches cannot be computed where one S_r is. But
its
gradient can: with g = dL/dS, which every rank knows once S is, each adds <g, S_r> to what it differentiates.

Shape legend: E experts, K experts of a token, Z tasks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from triptych.models.assignment import NOWHERE
from triptych.models.moe_config import BalanceConfig


class RoutingSums(NamedTuple):
    """Sums over tokens, padding left out. p: the router's probabilities over experts, without noise."""

    tokens: torch.Tensor
    """(): how many."""
    load: torch.Tensor
    """(E,): tokens that chose the expert, whether it took them or not."""
    importance: torch.Tensor
    """(E,): p."""
    smooth_load: torch.Tensor
    """(E,): probability that the expert is chosen under another draw of noise; zeros where losses.load is
    0."""
    z: torch.Tensor
    """(): squared log-sum-exp of the logits."""
    entropy: torch.Tensor
    """(): entropy of p, in nats."""
    dropped: torch.Tensor
    """(): choices that found their expert full."""
    task_tokens: torch.Tensor
    """(Z,): tokens by task."""
    task_importance: torch.Tensor
    """(Z, E): p by task."""
    task_load: torch.Tensor
    """(Z, E): load by task."""

    @staticmethod
    def shapes(num_tasks: int, num_experts: int) -> list[tuple[int, ...]]:
        """Of the fields, in their order."""
        E, Z = num_experts, num_tasks
        return [(), (E,), (E,), (E,), (), (), (), (Z,), (Z, E), (Z, E)]

    def flatten(self) -> torch.Tensor:
        """float64 (sum of sizes,)."""
        return torch.cat([field.double().flatten() for field in self])

    @classmethod
    def unflatten(cls, flat: torch.Tensor, num_tasks: int, num_experts: int) -> RoutingSums:
        """What `flatten` was called on."""
        shapes = cls.shapes(num_tasks, num_experts)
        parts = flat.split([math.prod(shape) for shape in shapes])
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes)))

    @classmethod
    def size(cls, num_tasks: int, num_experts: int) -> int:
        """Elements of `flatten`."""
        return sum(map(math.prod, cls.shapes(num_tasks, num_experts)))


def add_up(
    p_BTE: torch.Tensor,
    z_BT1: torch.Tensor,
    smooth_BTE: torch.Tensor,
    *,
    chosen_NK: torch.Tensor,
    experts_NK: torch.Tensor,
    tasks_B: torch.Tensor,
    padding_BT: torch.Tensor | None,
    num_tasks: int,
) -> RoutingSums:
    """Sums over tokens, in float64. p, z, smooth: 0 for padding. chosen, experts: before and after capacity,
    -1 for nowhere."""
    B, T, E = p_BTE.shape
    rows_ZB = (torch.arange(num_tasks, device=tasks_B.device).unsqueeze(1) == tasks_B).double()
    chosen_BS = chosen_NK.reshape(B, -1)
    load_BE = p_BTE.new_zeros(B, E, dtype=torch.float64)
    load_BE = load_BE.scatter_add(1, chosen_BS.clamp_min(0), (chosen_BS != NOWHERE).double())
    tokens_B = p_BTE.new_full((B,), T, dtype=torch.float64)
    if padding_BT is not None:
        tokens_B = (~padding_BT).sum(1).double()
    task_importance = rows_ZB @ p_BTE.sum(1, dtype=torch.float64)
    task_load = rows_ZB @ load_BE
    return RoutingSums(
        tokens=tokens_B.sum(),
        load=task_load.sum(0),
        importance=task_importance.sum(0),
        smooth_load=smooth_BTE.sum((0, 1), dtype=torch.float64),
        z=z_BT1.sum(dtype=torch.float64),
        entropy=torch.special.entr(p_BTE.detach()).sum(dtype=torch.float64),
        dropped=(chosen_NK != experts_NK).sum().double(),
        task_tokens=rows_ZB @ tokens_B,
        task_importance=task_importance,
        task_load=task_load,
    )


def switch_loss(sums: RoutingSums) -> torch.Tensor:
    """E sum_e f_e P_e, with the share f of choices and of probability P that an expert gets; 1 where both are
    uniform (Switch Transformer, arXiv 2101.03961, equation 4)."""
    f = sums.load / sums.load.sum().clamp_min(1)
    P = sums.importance / sums.tokens.clamp_min(1)
    return len(f) * (f * P).sum()


def cv_squared(x: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation, var(x) / mean(x)² (arXiv 1701.06538, equations 7 and 11); 0 for
    zeros."""
    return x.var(correction=0) / x.mean().square().clamp_min(torch.finfo(x.dtype).tiny)


def mutual_information(joint: torch.Tensor) -> torch.Tensor:
    """I = sum_te P(t, e) log(P(t, e) / (P(t) P(e))) of a table (Z, E) >= 0 proportional to P, in nats
    (Mod-Squad, arXiv 2212.08066, equation 5)."""
    joint = joint / joint.sum().clamp_min(torch.finfo(joint.dtype).tiny)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # Where the joint is 0 so is its term: ones there keep quotients, logarithms and their gradients finite.
    ratio = torch.where(joint > 0, joint, 1) / torch.where(joint > 0, apart, 1)
    return (joint * ratio.log()).sum()


def losses(config: BalanceConfig, sums: RoutingSums, costs_E: torch.Tensor) -> dict[str, torch.Tensor]:
    """The value of each loss that has a weight, by its name, without the weight; differentiable in the sums.

    costs: of a token in each expert, in any unit.
    """
    values = {
        "switch": lambda: switch_loss(sums),
        "importance": lambda: cv_squared(sums.importance),
        "load": lambda: cv_squared(sums.smooth_load),
        "z": lambda: sums.z / sums.tokens.clamp_min(1),
        "mutual_information": lambda: -mutual_information(sums.task_importance),
        "latency": lambda: cv_squared(sums.importance * costs_E),
    }
    return {name: value() for name, value in values.items() if getattr(config, name) > 0}


def weighs(config: BalanceConfig) -> bool:
    """Whether any loss has a weight."""
    return any(weight > 0 for _, weight in config)


def gradient(
    config: BalanceConfig, flat: torch.Tensor, num_tasks: int, num_experts: int, costs_E: torch.Tensor
) -> torch.Tensor:
    """Of the weighted sum of the losses by the flat global sums, of their shape; without a graph."""
    # What recomputation and sequence parallelism do with saved tensors is for those that backward waits for.
    kept_as_is = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch.enable_grad(), kept_as_is:
        flat = flat.detach().requires_grad_()
        values = losses(config, RoutingSums.unflatten(flat, num_tasks, num_experts), costs_E)
        total = torch.stack([getattr(config, name) * value for name, value in values.items()]).sum()
        return torch.autograd.grad(total, flat)[0]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def attach(stream: torch.Tensor, surrogate: torch.Tensor | None) -> torch.Tensor:
    """The stream, in whose backward pass the scalar `surrogate` gets the gradient 1; None: nothing to
    attach."""
    return stream if surrogate is None else _Attach.apply(stream, surrogate)


class _Attach(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
        ctx.like = surrogate.dtype, surrogate.device
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device)
