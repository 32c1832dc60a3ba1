import math

import pytest
import torch

from triptych.models import balancing
from triptych.models.balancing import RoutingSums, cv_squared, mutual_information, switch_loss
from triptych.models.moe_config import BalanceConfig

TASKS, EXPERTS = 3, 5
ALL = BalanceConfig(switch=0.3, importance=0.2, load=0.7, z=0.1, mutual_information=0.4, latency=0.6)
COSTS = torch.tensor([4.0, 4.0, 1.0, 1.0, 0.5], dtype=torch.float64)


def random_sums(seed: int = 0) -> RoutingSums:
    generator = torch.Generator().manual_seed(seed)
    shapes = RoutingSums.shapes(TASKS, EXPERTS)
    return RoutingSums(*(torch.rand(s, generator=generator, dtype=torch.float64) * 9 + 1 for s in shapes))


def uniform_sums(tokens: float = 40.0, top_k: int = 2) -> RoutingSums:
    def per_expert(total: float) -> torch.Tensor:
        return torch.full((EXPERTS,), total / EXPERTS, dtype=torch.float64)

    return random_sums()._replace(
        tokens=torch.tensor(tokens, dtype=torch.float64),
        load=per_expert(tokens * top_k),
        importance=per_expert(tokens),
    )


def test_flat_sums_unfold_to_themselves():
    sums = random_sums()
    flat = sums.flatten()
    assert flat.shape == (RoutingSums.size(TASKS, EXPERTS),) and flat.dtype == torch.float64
    for field, expected in zip(RoutingSums.unflatten(flat, TASKS, EXPERTS), sums):
        assert torch.equal(field, expected)


def test_flat_sums_add_up():
    a, b = random_sums(1), random_sums(2)
    added = RoutingSums.unflatten(a.flatten() + b.flatten(), TASKS, EXPERTS)
    assert torch.equal(added.task_load, a.task_load + b.task_load) and torch.equal(added.z, a.z + b.z)


def test_switch_loss_is_1_at_uniform_routing_and_e_where_one_expert_has_all():
    torch.testing.assert_close(switch_loss(uniform_sums()).item(), 1.0, rtol=0, atol=1e-15)
    one = torch.zeros(EXPERTS, dtype=torch.float64)
    one[2] = 40
    assert switch_loss(uniform_sums()._replace(load=one, importance=one)).item() == EXPERTS


def test_switch_loss_as_in_the_paper():
    sums = random_sums()
    tokens = float(sums.tokens)
    f = [float(load) / float(sums.load.sum()) for load in sums.load]
    P = [float(importance) / tokens for importance in sums.importance]
    expected = EXPERTS * sum(a * b for a, b in zip(f, P))
    assert switch_loss(sums).item() == pytest.approx(expected, rel=1e-14)


def test_squared_coefficient_of_variation():
    x = random_sums().importance
    mean = sum(x.tolist()) / EXPERTS
    variance = sum((value - mean) ** 2 for value in x.tolist()) / EXPERTS
    assert cv_squared(x).item() == pytest.approx(variance / mean**2, rel=1e-13)
    assert cv_squared(torch.full((4,), 3.0)).item() == 0


def test_mutual_information_by_its_definition():
    table = random_sums().task_importance
    joint = table / table.sum()
    expected = 0.0
    for t in range(TASKS):
        for e in range(EXPERTS):
            p = float(joint[t, e])
            expected += p * math.log(p / (float(joint[t].sum()) * float(joint[:, e].sum())))
    assert mutual_information(table).item() == pytest.approx(expected, rel=1e-12)


def test_mutual_information_of_independent_and_of_disjoint_tasks():
    tasks, experts = torch.rand(TASKS, 1).double(), torch.rand(1, EXPERTS).double()
    assert mutual_information(tasks * experts).item() == pytest.approx(0, abs=1e-15)
    disjoint = torch.eye(3, dtype=torch.float64).repeat_interleave(2, dim=1).requires_grad_()
    value = mutual_information(disjoint)
    assert value.item() == pytest.approx(math.log(3), rel=1e-14)
    value.backward()
    assert disjoint.grad.isfinite().all()


def test_latency_is_even_where_costly_experts_get_less():
    sums = uniform_sums()._replace(importance=1 / COSTS)
    assert balancing.losses(BalanceConfig(latency=1), sums, COSTS)["latency"].item() < 1e-30
    alike = balancing.losses(BalanceConfig(latency=1, importance=1), uniform_sums(), COSTS)
    assert alike["importance"].item() < 1e-30 < alike["latency"].item()


def test_losses_without_weight_are_left_out():
    assert list(balancing.losses(BalanceConfig(z=1e-3), random_sums(), COSTS)) == ["z"]
    assert not balancing.weighs(BalanceConfig()) and balancing.weighs(BalanceConfig(latency=0.1))


def total(flat: torch.Tensor) -> torch.Tensor:
    values = balancing.losses(ALL, RoutingSums.unflatten(flat, TASKS, EXPERTS), COSTS)
    assert len(values) == 6
    return sum(getattr(ALL, name) * value for name, value in values.items())


def test_gradient_equals_finite_differences():
    flat = random_sums().flatten()
    found = balancing.gradient(ALL, flat, TASKS, EXPERTS, COSTS)
    for i in range(len(flat)):
        step = torch.zeros_like(flat)
        step[i] = 1e-5
        expected = (total(flat + step) - total(flat - step)) / 2e-5
        torch.testing.assert_close(found[i], expected, rtol=1e-7, atol=1e-10)
    assert not found.requires_grad


def test_gradient_within_no_grad_and_around_saved_tensor_hooks():
    """Hooks of recomputation must neither see nor serve what this differentiation saves."""
    flat = random_sums().flatten()
    expected = balancing.gradient(ALL, flat, TASKS, EXPERTS, COSTS)

    def refuse(x):
        raise AssertionError("a saved tensor of the losses reached the hooks")

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert torch.equal(balancing.gradient(ALL, flat, TASKS, EXPERTS, COSTS), expected)


def test_no_tokens_no_nan():
    flat = torch.zeros(RoutingSums.size(TASKS, EXPERTS), dtype=torch.float64)
    assert total(flat).isfinite()
    assert balancing.gradient(ALL, flat, TASKS, EXPERTS, COSTS).isfinite().all()


def test_a_task_and_an_expert_that_are_not_there_make_no_nan():
    sums = random_sums()
    sums.task_importance[1], sums.task_importance[:, 3] = 0, 0
    found = balancing.gradient(ALL, sums.flatten(), TASKS, EXPERTS, COSTS)
    assert found.isfinite().all()
    without = mutual_information(sums.task_importance[[0, 2]][:, [0, 1, 2, 4]])
    torch.testing.assert_close(mutual_information(sums.task_importance), without, rtol=1e-13, atol=0)


def test_attach_gives_the_surrogate_the_gradient_1():
    stream = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, requires_grad=True)
    attached = balancing.attach(stream, (weight**2).sum())
    assert torch.equal(attached, stream)
    (attached * 5).sum().backward()
    assert torch.equal(stream.grad, torch.full_like(stream, 5)) and torch.equal(
        weight.grad, 2 * weight.detach()
    )
    assert balancing.attach(stream, None) is stream
