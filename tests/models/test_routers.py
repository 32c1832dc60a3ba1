"""Routers against loops that say what they do in words of one token and one expert."""

import math

import pytest
import torch
from pydantic import ValidationError

from tests.models.routing import (
    build_router,
    row_context,
    some_padding,
    tasks_config,
    tokens,
)
from triptych.models import balancing
from triptych.models.balancing import RoutingSums
from triptych.models.context import Context
from triptych.models.sharding import Shards

LOSSES = {"switch": 0.3, "importance": 0.2, "z": 0.1, "mutual_information": 0.4}


def scores_by_hand(router, x, row, token):
    weight = router.weight if router.weight.ndim == 2 else router.weight[row % 3]
    logits = [float(weight[e].detach() @ x[row, token]) for e in range(router.num_experts)]
    if router.settings.router == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("per_task", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_best_experts_and_their_weights(kind, per_task, normalize):
    router = build_router(top_k=3, router=kind, per_task=per_task, normalize=normalize, scale=1.7)
    x = tokens()
    routing = router(x, row_context())
    for row in range(3):
        for token in range(7):
            scores = scores_by_hand(router, x, row, token)
            bias = [0.0] * 6 if router.expert_bias is None else router.expert_bias.tolist()
            best = sorted(range(6), key=lambda e: (-scores[e] - bias[e], e))[:3]
            n = row * 7 + token
            assert routing.experts[n].tolist() == best
            total = sum(scores[e] for e in best) if normalize else 1
            expected = [1.7 * scores[e] / total for e in best]
            assert routing.weights[n].tolist() == pytest.approx(expected, rel=1e-12)


def test_top_1_is_not_normalized_so_that_its_weight_teaches():
    router = build_router(top_k=1)
    weights = router(tokens(), row_context()).weights
    assert (weights < 1).all()
    weights.sum().backward()
    assert router.weight.grad.abs().sum() > 0


# ---- noise


def test_noise_is_a_function_of_the_sample_and_of_the_tokens_place():
    router = build_router(router="noisy", noise_std=2.0, top_k=2)
    x = tokens()
    together = router(x, row_context())
    for row in range(3):
        alone = router(x[row : row + 1], row_context(row, 1))
        assert torch.equal(alone.experts, together.experts[row * 7 : row * 7 + 7])
    other = router(x, Context(sample_keys=torch.arange(3) + 1000, tasks=torch.arange(3)))
    assert not torch.equal(other.experts, together.experts)


def test_noise_has_the_standard_deviation_asked_for_and_none_in_eval():
    router = build_router(router="noisy", num_experts=8)
    logits = torch.zeros(64, 50, 8, dtype=torch.float64)
    noise = router._with_noise(logits, Context(sample_keys=torch.arange(64)))
    assert noise.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert router._with_noise(logits, Context()) is logits
    assert router.eval()._with_noise(logits, Context(sample_keys=torch.arange(64))) is logits


def test_smooth_load_is_the_chance_of_another_draw():
    """V-MoE: over many draws of an expert's noise, how often is it among the k best of the others' noise?"""
    router = build_router(router="noisy", noise_std=0.7, top_k=2, losses={"load": 1.0})
    x, context = tokens(1, 1), row_context(rows=1)
    router(x, context)
    found = RoutingSums.unflatten(router.take_record(), 3, 6).smooth_load
    logits = (x.flatten(0, 1) @ router.weight.T).detach()
    noisy = router._with_noise(logits.unsqueeze(0), context)[0, 0]
    second = noisy.sort(descending=True).values[1]
    draws = logits + 0.7 * torch.randn(200_000, 6, dtype=torch.float64)
    torch.testing.assert_close(found, (draws >= second).double().mean(0), rtol=0, atol=6e-3)


# ---- bias


def test_bias_moves_choices_and_not_weights():
    router = build_router(router="sigmoid", top_k=2, normalize=False)
    x = tokens()
    with torch.no_grad():
        router.expert_bias.zero_()
        router.expert_bias[4] = 10
    routing = router(x, row_context())
    assert (routing.experts[:, 0] == 4).all()
    scores = torch.sigmoid(x.flatten(0, 1) @ router.weight.T)
    torch.testing.assert_close(routing.weights, scores.gather(1, routing.experts), rtol=0, atol=1e-15)


def test_bias_evens_out_the_load_without_a_loss():
    router = build_router(router="sigmoid", top_k=2, bias_rate=0.01)
    with torch.no_grad():
        router.expert_bias.zero_()
    x, spread = tokens(32, 8), []
    for _ in range(150):
        router(x, row_context(rows=32))
        record = router.take_record()
        spread.append(balancing.cv_squared(RoutingSums.unflatten(record, 3, 6).load).item())
        before = router.expert_bias.clone()
        router.update(record)
        load = RoutingSums.unflatten(record, 3, 6).load
        expected = before + 0.01 * torch.sign(load.mean() - load)
        assert torch.equal(router.expert_bias.detach(), expected)
    assert spread[-1] < 0.005 < 0.03 < spread[0]
    assert router.expert_bias.grad is None and not router.expert_bias.requires_grad


# ---- tasks


def test_gates_of_a_task_that_is_not_there_get_a_gradient_of_zero():
    router = build_router(per_task=True, top_k=2)
    router(tokens(), Context(tasks=torch.tensor([0, 2, 2]))).weights.square().sum().backward()
    assert torch.equal(router.weight.grad[1], torch.zeros_like(router.weight[1]))
    assert router.weight.grad[0].abs().sum() > 0 < router.weight.grad[2].abs().sum()


@pytest.mark.parametrize("per_task", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy"])
def test_appended_experts_change_no_bit_of_the_tasks_that_do_not_see_them(kind, per_task):
    for sizes in ((3, 7), (5, 33), (2, 1)):
        old = build_router(5, router=kind, per_task=per_task, top_k=2)
        new = build_router(9, router=kind, per_task=per_task, top_k=2, visible={"red": 5, "green": 5}, seed=3)
        with torch.no_grad():
            new.weight[..., :5, :] = old.weight
            if old.expert_bias is not None:
                new.expert_bias[:5] = old.expert_bias
        for dtype in (torch.float64, torch.float32):
            x = tokens(*sizes).to(dtype)
            context = Context(tasks=torch.arange(sizes[0]) % 2)
            before, after = old.to(dtype).eval()(x, context), new.to(dtype).eval()(x, context)
            assert torch.equal(before.experts, after.experts) and torch.equal(before.weights, after.weights)


def test_tasks_choose_among_what_they_see_alone():
    router = build_router(9, top_k=2, visible={"red": 3, "green": 5}, losses={"switch": 1.0, "z": 1.0})
    routing = router(tokens(30, 7), row_context(rows=30))
    most = routing.experts.view(30, -1).amax(1)
    assert (most[0::3] < 3).all() and (most[1::3] < 5).all() and (most[2::3] >= 5).any()
    sums = RoutingSums.unflatten(router.take_record(), 3, 9)
    assert (sums.task_importance[0, 3:] == 0).all() and (sums.task_importance[1, 5:] == 0).all()
    torch.testing.assert_close(sums.importance.sum(), sums.tokens, rtol=1e-12, atol=0)
    (routing.weights.sum() + routing.surrogate).backward()
    assert router.weight.grad.isfinite().all()


def test_what_a_task_sees_alone_gets_no_gradient_from_another():
    router = build_router(9, top_k=2, visible={"red": 5}, losses={"switch": 1.0, "z": 1.0})
    routing = router(tokens(), Context(tasks=torch.zeros(3, dtype=torch.int64)))
    (routing.weights.square().sum() + routing.surrogate).backward()
    assert torch.equal(router.weight.grad[5:], torch.zeros(4, 12, dtype=torch.float64))
    assert router.weight.grad[:5].abs().sum() > 0


# ---- sums, records, losses


def test_the_record_counts_what_it_says():
    router = build_router(top_k=2, per_task=True)
    x, padding = tokens(), some_padding()
    routing = router(x, row_context(padding=padding))
    sums = RoutingSums.unflatten(router.take_record(), 3, 6)
    expected = {name: torch.zeros_like(value) for name, value in sums._asdict().items()}
    for n in range(21):
        row, token = divmod(n, 7)
        if padding[row, token]:
            assert routing.experts[n].tolist() == [-1, -1]
            continue
        logits = router.weight[row].detach() @ x[row, token]
        p = logits.softmax(-1)
        expected["tokens"] += 1
        expected["importance"] += p
        expected["task_importance"][row] += p
        expected["task_tokens"][row] += 1
        expected["z"] += logits.exp().sum().log() ** 2
        expected["entropy"] -= (p * p.log()).sum()
        for e in routing.experts[n]:
            expected["load"][e] += 1
            expected["task_load"][row, e] += 1
    for name, value in sums._asdict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_records_add_up_until_taken():
    router = build_router()
    router(tokens(seed=1), row_context())
    first = router.record
    router(tokens(seed=2), row_context())
    both = router.take_record()
    router(tokens(seed=2), row_context())
    torch.testing.assert_close(first + router.take_record(), both, rtol=1e-13, atol=1e-13)
    assert torch.equal(router.take_record(), torch.zeros(RoutingSums.size(3, 6), dtype=torch.float64))


def test_who_records_and_who_learns():
    router = build_router(losses=LOSSES)
    assert router(tokens(), row_context()).surrogate is not None and router.record is not None
    router.take_record()
    with torch.no_grad():
        assert router(tokens(), row_context()).surrogate is None and router.record is None
        router.collecting = True
        assert router(tokens(), row_context()).surrogate is None and router.record is not None
    router.collecting = False
    ahead = router.take_record()
    router.eval()
    assert router(tokens(), row_context()).surrogate is None and router.record is None
    router.observing = True
    assert router(tokens(), row_context()).surrogate is None
    torch.testing.assert_close(router.take_record(), ahead, rtol=1e-13, atol=1e-13)


def test_losses_learn_on_the_first_tp_rank_alone():
    router = build_router(losses=LOSSES)
    router.shards = Shards()
    router.shards.start, router.shards.count = 1, 2
    assert router(tokens(), row_context()).surrogate is None
    assert router.take_record().sum() > 0


def total_loss(router, weight, x, context):
    """The weighted losses of the whole batch, from a pass that does nothing but record."""
    kept = router.weight.detach().clone()
    router.take_record()
    with torch.no_grad():
        router.weight.copy_(weight)
        router.collecting = True
        router(x, context())
        sums = RoutingSums.unflatten(router.take_record(), 3, router.num_experts)
        router.collecting = False
        router.weight.copy_(kept)
    losses = router.settings.losses
    values = balancing.losses(losses, sums, router._costs(x))
    return sum(getattr(losses, name) * value for name, value in values.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "softmax", "losses": LOSSES | {"latency": 0.3}, "per_task": True},
        {"router": "noisy", "losses": LOSSES | {"load": 0.5}},
        {"router": "sigmoid", "losses": LOSSES},
        {"router": "softmax", "losses": LOSSES, "visible": {"red": 4}},
    ],
)
def test_surrogates_of_micro_batches_have_the_gradient_of_the_global_losses(settings):
    """Finite differences of the losses of the whole batch; rows one by one, with the sums known from
    ahead."""
    router = build_router(top_k=2, **settings)
    x, padding = tokens(), some_padding()
    router.collecting = True
    with torch.no_grad():
        for row in range(3):
            router(x[row : row + 1], row_context(row, 1, padding=padding[row : row + 1]))
    router.ahead, router.collecting = router.take_record(), False
    for row in range(3):
        context = row_context(row, 1, padding=padding[row : row + 1])
        router(x[row : row + 1], context).surrogate.backward()
    split = router.weight.grad.clone()
    router.ahead, router.weight.grad = None, None
    router(x, row_context(padding=padding)).surrogate.backward()
    torch.testing.assert_close(split, router.weight.grad, rtol=1e-11, atol=1e-13)
    weight = router.weight.detach().clone()
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)

        def at(step, direction=direction):
            return total_loss(router, weight + step * direction, x, lambda: row_context(padding=padding))

        expected = (at(1e-5) - at(-1e-5)) / 2e-5
        torch.testing.assert_close((split * direction).sum(), expected, rtol=1e-6, atol=1e-9)


def test_a_second_run_of_a_pass_repeats_its_decisions_and_records_nothing():
    router = build_router(losses=LOSSES, routing="capacity", capacity_factor=0.6, min_capacity=1)
    x, context = tokens(), row_context()
    first = router(x, context)
    record = router.take_record()
    router.batch = None  # No second collective.
    second = router(x, context)
    assert torch.equal(first.experts, second.experts) and torch.equal(first.weights, second.weights)
    assert torch.equal(first.surrogate, second.surrogate) and router.record is None
    assert record.sum() > 0


def test_figures():
    router = build_router(top_k=2, routing="capacity", capacity_factor=0.6, losses=LOSSES)
    routing = router(tokens(), row_context())
    figures = router.figures(router.take_record())
    torch.testing.assert_close(figures["load"].sum(), torch.tensor(1.0, dtype=torch.float64))
    assert figures["dropped"] == pytest.approx((routing.experts < 0).sum().item() / 42)
    assert set(figures["losses"]) == set(LOSSES) and 0 < figures["entropy"] <= math.log(6)
    assert list(figures["task_load"]) == ["red", "green", "blue"]
    for load in figures["task_load"].values():
        torch.testing.assert_close(load.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert router.figures(router.take_record())["load"].isfinite().all()


# ---- precision, meta, sizes


def test_logits_are_in_fp32_under_autocast():
    router = build_router(losses=LOSSES).float()
    x = tokens().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x, row_context())
    assert routing.weights.dtype == torch.float32
    expected = router(x.float(), row_context())
    assert torch.equal(routing.experts, expected.experts) and torch.equal(routing.weights, expected.weights)


def test_weights_stay_fp32_in_a_model_of_bf16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight = build_router.__globals__["Router"](tasks_config(), tasks_config().moe, 0, 4, "moe").weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["softmax", "noisy", "sigmoid", "expert_choice"])
@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_shapes_alone(kind, routing):
    load = {"load": 0.1} if kind == "noisy" else {}
    settings = {"router": kind, "routing": routing, "visible": {"red": 4}, "losses": LOSSES | load}
    router = build_router(**settings).to("meta")
    x = tokens().to("meta")
    context = Context(
        sample_keys=torch.zeros(3, dtype=torch.int64, device="meta"),
        tasks=torch.zeros(3, dtype=torch.int64, device="meta"),
        padding=torch.zeros(3, 7, dtype=torch.bool, device="meta"),
    )
    found = router(x, context)
    assert found.experts.shape == found.weights.shape == (21, 6 if kind == "expert_choice" else 2)
    (found.weights.sum() + found.surrogate).backward()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 9}, r"model\.moe\.top_k=9 exceeds the 8 experts of layer 0; use at most 8"),
        ({"num_experts_of": {1: 1}}, r"top_k=2 exceeds the 1 experts of layer 1"),
        ({"num_experts_of": {5: 4}}, r"num_experts_of\.5: block 5 .* use one of 0, 1"),
        ({"visible": {"red": 9}}, r"visible\.red=9 must be at least model\.moe\.top_k=2 and at most 8"),
        ({"visible": {"red": 1}}, r"visible\.red=1 must be at least"),
        ({"visible": {"pink": 4}}, r"visible\.pink: no task has that name; there are red, green, blue"),
        ({"losses": {"load": 0.1}}, r"losses\.load=0\.1 is of noise, and router=softmax"),
        ({"router": "noisy", "noise_std": 0, "losses": {"load": 0.1}}, r"noise_std=0\.0 has none"),
        ({"top_k": 1, "normalize": True}, r"normalize=true with top_k=1"),
        ({"router": "expert_choice", "routing": "capacity"}, r"leave routing out"),
        ({"residual": True, "shared_experts": 1}, r"choose one"),
        ({"losses": {"switch": -1}}, r"greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ValidationError, match=words):
        tasks_config(moe=settings)


def test_settings_that_only_language_models_refuse():
    from tests.models.common import small_config

    with pytest.raises(ValidationError, match=r"router=expert_choice compares tokens with later ones"):
        small_config(pattern=["attention+moe"], moe={"router": "expert_choice"})
    with pytest.raises(ValidationError, match=r"mutual_information=0\.1 is of tasks .* there is one task"):
        small_config(pattern=["attention+moe"], moe={"losses": {"mutual_information": 0.1}})
    with pytest.raises(ValidationError, match=r"visible\.red: no task .* there are none in this family"):
        small_config(pattern=["attention+moe"], moe={"visible": {"red": 4}})
