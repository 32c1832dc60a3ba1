"""Who goes where, against loops over tokens and experts; and ranks against one process."""

import math

import pytest
import torch

from tests.models.common import on_ranks
from tests.models.routing import ThreadBatch, build_router, row_context, some_padding, tokens
from triptych.models.assignment import best_tokens, coarse, first_come, top_experts
from triptych.models.balancing import RoutingSums

LOSSES = {"switch": 0.3, "importance": 0.2, "z": 0.1, "mutual_information": 0.4}


def test_the_first_of_equals_is_chosen():
    choice = torch.tensor([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0], [2, 1, 2, 1, 5]])
    assert top_experts(choice, 3).tolist() == [[1, 2, 4], [0, 1, 2], [4, 0, 2]]


# ---- capacity


def capacity_by_hand(chosen, best, capacity):
    """Slot by slot, the tokens of largest best score first."""
    order = sorted(range(len(chosen)), key=lambda n: (-best[n], n))
    room = [capacity] * 1000
    kept = [[-1] * len(chosen[0]) for _ in chosen]
    for k in range(len(chosen[0])):
        for n in order:
            expert = chosen[n][k]
            if expert >= 0 and room[expert] > 0:
                room[expert] -= 1
                kept[n][k] = expert
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_first_come_equals_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(40, 5, generator=generator).argsort(-1)[:, :3]
    chosen[torch.rand(40, generator=generator) < 0.2] = -1
    best = torch.randint(6, (40,), generator=generator).double()
    kept = first_come(chosen, best, torch.tensor(7))
    expected = capacity_by_hand(chosen.tolist(), best.tolist(), 7)
    assert torch.where(kept, chosen, -1).tolist() == expected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy"])
def test_capacity_equals_a_loop(kind, padded):
    settings = {"router": kind, "top_k": 2, "routing": "capacity", "capacity_factor": 0.8, "min_capacity": 1}
    free = build_router(router=kind, top_k=2)
    router = build_router(**settings)
    x, context = tokens(), row_context(padding=some_padding() if padded else None)
    chosen = free(x, row_context(padding=context.padding)).experts
    routing = router(x, context)
    with torch.no_grad():
        logits = router._with_noise(x @ router.weight.T, context)
        best = (logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)).amax(-1).flatten()
    number = 21 - (4 if padded else 0)
    capacity = math.ceil(0.8 * 2 * number / 6)
    expected = capacity_by_hand(chosen.tolist(), best.tolist(), capacity)
    assert routing.experts.tolist() == expected
    dropped = sum(e == -1 for row in expected for e in row) - (8 if padded else 0)
    assert dropped > 0
    assert (routing.weights[routing.experts == -1] == 0).all()
    record = RoutingSums.unflatten(router.take_record(), 3, 6)
    assert record.dropped.item() == dropped and record.tokens.item() == number
    assert record.load.sum().item() == 2 * number
    kept = routing.experts != -1
    weights = free(x, row_context(padding=context.padding)).weights
    assert torch.equal(routing.weights[kept], weights[kept])


def test_in_eval_mode_nothing_is_dropped_and_min_capacity_holds():
    router = build_router(top_k=2, routing="capacity", capacity_factor=0.1, min_capacity=3)
    x = tokens()
    kept = router(x, row_context()).experts
    counts = torch.bincount(kept[kept >= 0], minlength=6)
    assert counts.max() == 3
    assert (router.eval()(x, row_context()).experts >= 0).all()


def choices_of(rank, group, settings, padding, ranks):
    """What a rank of some decides about its rows of a batch of four."""
    router = build_router(**settings)
    if group is not None:
        router.batch = ThreadBatch(group, rank)
    rows = 4 // ranks
    part = slice(rank * rows, (rank + 1) * rows)
    context = row_context(rank * rows, rows, padding=padding[part])
    routing = router(tokens(4)[part], context)
    (routing.weights.square().sum() + routing.surrogate).backward()
    width = routing.experts.shape[1]
    experts = torch.nn.functional.pad(routing.experts, (0, 6 - width), value=-1)
    return experts, router.take_record(), router.weight.grad


@pytest.mark.parametrize(
    "settings",
    [
        {
            "router": "noisy",
            "top_k": 2,
            "routing": "capacity",
            "capacity_factor": 0.7,
            "losses": {"load": 0.3},
        },
        {"router": "softmax", "top_k": 2, "losses": LOSSES},
        {"router": "expert_choice", "top_k": 2, "capacity_factor": 0.7, "losses": LOSSES},
        {"router": "sigmoid", "top_k": 2, "routing": "capacity", "capacity_factor": 0.7, "losses": LOSSES},
    ],
)
def test_ranks_decide_and_learn_as_one_process(settings):
    padding = some_padding(4)
    whole, record, gradient = choices_of(0, None, settings, padding, 1)
    for ranks in (2, 4):
        found = on_ranks(ranks, lambda r, group, n=ranks: choices_of(r, group, settings, padding, n))
        assert torch.equal(torch.cat([part[0] for part in found]), whole)
        torch.testing.assert_close(sum(part[1] for part in found), record, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(sum(part[2] for part in found), gradient, rtol=1e-10, atol=1e-12)


# ---- expert choice


@pytest.mark.parametrize("training", [True, False])
def test_experts_choose_their_best_tokens(training):
    router = build_router(router="expert_choice", top_k=2, capacity_factor=1.1, min_capacity=1)
    router.train(training)
    x, padding = tokens(), some_padding()
    routing = router(x, row_context(padding=padding))
    p = (x @ router.weight.T).detach().softmax(-1)
    taken = [set() for _ in range(21)]
    rows = [list(range(21))] if training else [list(range(7 * row, 7 * row + 7)) for row in range(3)]
    for row in rows:
        there = [n for n in row if not padding.flatten()[n]]
        capacity = math.ceil(1.1 * 2 * len(there) / 6)
        for e in range(6):
            for n in sorted(there, key=lambda n: (-float(p.flatten(0, 1)[n, e]), n))[:capacity]:
                taken[n].add(e)
    for n in range(21):
        found = [e for e in routing.experts[n].tolist() if e >= 0]
        assert sorted(found) == sorted(taken[n])
        weights = [float(w) for w, e in zip(routing.weights[n].detach(), routing.experts[n]) if e >= 0]
        assert weights == pytest.approx([float(p.flatten(0, 1)[n, e]) for e in found], rel=1e-12)
    assert (routing.weights[routing.experts < 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_tokens_are_served_in_order_whatever_the_rounding(dtype):
    """The last bits of equal tokens' scores depend on the layout; who finds room must not."""
    step = torch.finfo(dtype).eps
    scores = torch.tensor([0.3, 0.7, 0.7, 0.7, 0.7, 0.1], dtype=dtype)
    wiggles = [torch.tensor([0, a, b, c, d, 0], dtype=dtype) for a, b, c, d in ((0, 0, 0, 0), (-2, 1, 3, -1))]
    chosen = torch.zeros(6, 1, dtype=torch.int64)
    for wiggle in wiggles:
        moved = scores + wiggle * step
        kept = first_come(chosen, moved, torch.tensor(3))
        assert kept.flatten().tolist() == [False, True, True, True, False, False]
        taken = best_tokens(moved.view(1, 6, 1), torch.tensor([3]))
        assert taken.flatten().tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coarse_scores_keep_half_their_digits(dtype):
    eps = torch.finfo(dtype).eps ** 0.5
    scores = torch.rand(1000, dtype=dtype) * 10.0 ** torch.arange(-5, 5).repeat(100)
    scores = torch.cat([scores, -scores])
    assert bool(((coarse(scores) - scores).abs() <= 2 * eps * scores.abs()).all())
    assert len(coarse(scores * (1 + torch.linspace(0, 0.5, 2000, dtype=dtype))).unique()) > 1500
    special = torch.tensor([-torch.inf, 0.0, 1.0, 0.5, torch.inf], dtype=dtype)
    assert torch.equal(coarse(special), special)
