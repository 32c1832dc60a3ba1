"""Stacked experts against one linear at a time."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.common import window_of
from tests.models.routing import HIDDEN, randomize, tasks_config
from triptych.models.experts import ExpertLinear, Experts, LowRankExperts
from triptych.models.init import Normal, Xavier, init_table
from triptych.models.sharding import EXPERT_ROW_BIAS, Exchange, Sent

COUNTS = [3, 0, 5, 1]


def build(kind: str, **overrides) -> torch.nn.Module:
    config = tasks_config(**overrides)
    made = {
        "swiglu": lambda: Experts(config, 4, "swiglu", 10, True),
        "gelu": lambda: Experts(config, 4, "gelu", 10, True),
        "low_rank": lambda: LowRankExperts(config, 4, 6),
        "linear": lambda: ExpertLinear(config, 4, HIDDEN, 6, bias=True),
    }
    return made[kind]().double()


def one(experts: torch.nn.Module, e: int, x: torch.Tensor) -> torch.Tensor:
    """Expert e for all rows."""
    p = {name: parameter[e] for name, parameter in experts.named_parameters()}
    if isinstance(experts, ExpertLinear):
        return F.linear(x, p["weight"], p["bias"])
    if isinstance(experts, LowRankExperts):
        return x @ p["down_proj"].T @ p["up_proj"].T
    up = F.linear(x, p["up_proj"], p["up_bias"])
    if experts.gate_proj is None:
        hidden = F.gelu(up, approximate="tanh")
    else:
        hidden = F.silu(F.linear(x, p["gate_proj"], p["gate_bias"])) * up
    return F.linear(hidden, p["down_proj"], p["down_bias"])


def rows() -> torch.Tensor:
    return torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KINDS = ["swiglu", "gelu", "low_rank", "linear"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_meets_its_expert(kind):
    experts = build(kind)
    randomize(experts)
    x = rows().requires_grad_()
    y = experts(x, torch.tensor(COUNTS))
    parts = [one(experts, e, part) for e, part in enumerate(x.split(COUNTS))]
    torch.testing.assert_close(y, torch.cat(parts), rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    inputs = (x, *experts.parameters())
    found = torch.autograd.grad((y * weights).sum(), inputs)
    expected = torch.autograd.grad((torch.cat(parts) * weights).sum(), inputs)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for gradient in found[1:]:
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_at_all(kind):
    experts = build(kind)
    randomize(experts)
    x = rows()[:0].requires_grad_()
    y = experts(x, torch.zeros(4, dtype=torch.int64))
    assert y.shape[0] == 0
    y.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in experts.parameters())


class Halves(Exchange):
    """As rank `rank` of two: the rows of its half of the experts, which come from itself alone."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 2

    def there(self, rows_AC: torch.Tensor, counts_E: torch.Tensor) -> Sent:
        first, second = (int(part.sum()) for part in counts_E.chunk(2))
        mine = rows_AC.split([first, second])[self.rank]
        others = (0, second) if self.rank == 0 else (first, 0)
        back = lambda y: F.pad(y, (0, 0, *others))  # noqa: E731
        return Sent(mine, counts_E.chunk(2)[self.rank], back)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_experts_behind_an_exchange(kind):
    """Experts infer from the exchange alone how many they are."""
    experts = build(kind)
    randomize(experts)
    counts = torch.tensor(COUNTS)
    total = 0
    for rank in range(2):
        local = build(kind)
        for name, parameter in experts.named_parameters():
            setattr(local, name, torch.nn.Parameter(parameter.detach().chunk(2)[rank].clone()))
        local.exchange = Halves(rank)
        total = total + local(rows(), counts)
    torch.testing.assert_close(total, experts(rows(), counts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "low_rank"])
def test_partial_sums_of_shards_add_up(kind):
    experts = build(kind)
    randomize(experts)
    total = 0
    for rank in range(2):
        local = build(kind)
        for name, value in experts.named_parameters():
            cut = experts.sharding[name]
            value = value.detach()[window_of(cut, value.shape, 2, rank)].clone()
            value = value * 0 if cut == EXPERT_ROW_BIAS and rank else value
            setattr(local, name, torch.nn.Parameter(value))
        total = total + local(rows(), torch.tensor(COUNTS))
    torch.testing.assert_close(total, experts(rows(), torch.tensor(COUNTS)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_are_those_of_one_expert(kind):
    experts = build(kind, init="xavier")
    table = init_table(experts)
    for name, parameter in experts.named_parameters():
        assert name in experts.sharding
        if parameter.ndim == 3:
            assert table[name] == Xavier(*parameter.shape[1:])
    normal = init_table(build(kind))
    stds = {normal[name].std for name, p in experts.named_parameters() if p.ndim == 3}
    assert all(isinstance(normal[name], Normal) for name, p in experts.named_parameters() if p.ndim == 3)
    assert stds == ({0.02} if kind == "linear" else {0.02, 0.01})
