"""Cutting by the sharding tables, collectives and their adjoints, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.parallel.training import SEQ_LEN, global_batch, model_config
from triptych import models
from triptych.parallel.collectives import (
    Axis,
    gather_sequence,
    join_shards,
    scatter_sum,
    sum_in_backward,
    sum_partial,
)
from triptych.parallel.config import Recompute
from triptych.parallel.recompute import apply_recompute
from triptych.parallel.regather import gather_sequence_twice
from triptych.parallel.tensor import apply_tensor_parallel

Distributed = Callable[..., list[Any]]


def adjoints(dim: int) -> None:
    """<f(x), y> = <x, fᵀ(y)>, summed over the ranks, where f takes ranks' tensors to ranks' tensors."""
    axis = Axis.of(init_device_mesh("cpu", (dist.get_world_size(),)))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for function in (gather_sequence, scatter_sum):
        x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        y = function(x, dim, axis)
        other = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(y, x, other)
        products = torch.stack([(y * other).sum(), (x * gradient).sum()]).detach()
        dist.all_reduce(products)
        assert torch.allclose(products[0], products[1], rtol=1e-12), (function, products)


@pytest.mark.parametrize("dim", [0, 1])
def test_collectives_are_adjoint(dim: int, distributed: Distributed) -> None:
    distributed(2, adjoints, dim)


def test_collectives_change_shapes_only_on_meta() -> None:
    axis = Axis(size=4, rank=1)
    x = torch.empty(2, 8, 3, device="meta", requires_grad=True)
    assert gather_sequence(x, 1, axis).shape == (2, 32, 3)
    assert scatter_sum(x, 1, axis).shape == (2, 2, 3)
    assert join_shards(x, -1, axis).shape == (2, 8, 12)
    assert sum_partial(x, axis).shape == sum_in_backward(x, axis).shape == x.shape
    scatter_sum(gather_sequence(x, 1, axis), 1, axis).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_a_model_is_cut_without_processes() -> None:
    with torch.device("meta"):
        model = models.build(model_config())
        apply_tensor_parallel(model, Axis(size=4, rank=3))
        nll = model(
            torch.zeros(2, SEQ_LEN, dtype=torch.int64), targets=torch.zeros(2, SEQ_LEN, dtype=torch.int64)
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["embedding.weight"] == (6, 16)
    assert shapes["blocks.0.mixer.x_proj.weight"] == (8, 16)
    assert shapes["blocks.0.mixer.b_proj.weight"] == (4, 16)
    assert shapes["blocks.1.mixer.k_proj.weight"] == (4, 16)
    assert shapes["blocks.1.mixer.o_proj.weight"] == (16, 4)
    assert nll.shape == (2, SEQ_LEN)
    nll.sum().backward()


def regather_gradients() -> dict[str, Any]:
    """A region that uses its input in several ways, and the bytes that autograd keeps of it."""
    axis = Axis.of(init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = [torch.full((4, 4), 0.1 * k, dtype=torch.float64, requires_grad=True) for k in range(1, 4)]

    def region(whole: torch.Tensor) -> torch.Tensor:
        flat = whole.view(-1, 4) @ weights[0]
        heads = whole.unflatten(-1, (2, 2)).transpose(1, 2).square().sum()
        return (
            scatter_sum((whole @ weights[1] * (whole @ weights[2])) + flat.view(whole.shape), 1, axis) + heads
        )

    results = []
    for twice in (False, True):
        x = torch.arange(2 * 3 * 4, dtype=torch.float64).view(2, 3, 4).add(dist.get_rank()).requires_grad_()
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            if twice:
                with gather_sequence_twice(x, 1, axis) as whole:
                    y = region(whole)
            else:
                whole = gather_sequence(x, 1, axis)
                y = region(whole)
        del whole
        gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
        results.append((gradients, sorted(sizes)))
    same = all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0]))
    return {"same": same, "kept": results[0][1], "kept_twice": results[1][1]}


def test_gathering_again_changes_memory_only(distributed: Distributed) -> None:
    for result in distributed(2, regather_gradients):
        assert result["same"]
        whole, shard = 48, 24
        # Four uses keep the gathered input, whatever view of it they take; with the second gather, one shard.
        assert result["kept"].count(shard) == 0
        assert result["kept_twice"].count(shard) == 1
        assert result["kept"].count(whole) - result["kept_twice"].count(whole) == 4


def kept_bytes(policy: Recompute) -> int:
    model = models.build(model_config()).to(torch.float64)
    models.initialize(model, 0)
    apply_recompute(model, policy)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = global_batch(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch["tokens"], targets=batch["targets"], document_ids=batch["document_ids"]).sum()
    loss.backward()
    return sum(kept.values())


def test_each_policy_keeps_less_than_the_one_before() -> None:
    none, selective, full = (kept_bytes(policy) for policy in ("none", "selective", "full"))
    assert full < selective < none


def test_recomputation_does_nothing_without_gradients() -> None:
    model = models.build(model_config()).to(torch.float64)
    models.initialize(model, 0)
    batch = global_batch(0)
    with torch.no_grad():
        before = model(batch["tokens"])
        apply_recompute(model, "full")
        assert torch.equal(model(batch["tokens"]), before)
