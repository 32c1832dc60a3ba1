"""Attention experts against one token and one expert at a time."""

import pytest
import torch
from pydantic import ValidationError
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import random_tokens, small_config, small_model
from tests.models.regions import check_cuts
from tests.models.routing import HIDDEN, randomize, row_context, some_padding, tasks_config, tokens
from triptych import kernels, models
from triptych.models.context import Context, build_context
from triptych.models.mixers.attention_moe import AttentionMoE
from triptych.models.sharding import Shards

SIZE = 4
LOSSES = {"switch": 0.3, "z": 0.1, "mutual_information": 0.4}


def build(seed: int = 0, rope: bool = False, **settings) -> AttentionMoE:
    """In training mode, float64, of random weights."""
    section = {"num_experts": 6, "top_k": 2, "head_dim": SIZE, "bias": True} | settings
    attention = {"num_heads": 3, "rope_theta": 100.0 if rope else None}
    mixer = AttentionMoE(tasks_config(attention=attention, attention_moe=section), 1).double()
    randomize(mixer, seed)
    return mixer.train()


def by_hand(mixer, x, context, *, causal=False, documents=None):
    """One query of one expert at a time, with the router's decisions."""
    routing = mixer.router(x, context)
    (B, T, _), K = x.shape, routing.experts.shape[1]
    k, v = mixer.k_proj(x), mixer.v_proj(x)

    def turned(vector, t):
        if mixer.rope_theta is None:
            return vector
        return kernels.rotary(vector.view(1, 1, 1, -1), torch.tensor([t]), mixer.rope_theta).flatten()

    rows = []
    for b in range(B):
        keys = torch.stack([turned(k[b, t], t) for t in range(T)])
        for t in range(T):
            total = torch.zeros(HIDDEN, dtype=torch.float64)
            seen = [s for s in range(T) if not causal or s <= t]
            if documents is not None:
                seen = [s for s in seen if documents[b, s] == documents[b, t]]
            for slot in range(K):
                e = int(routing.experts[b * T + t, slot])
                if e < 0:
                    continue
                q = mixer.q_experts.weight[e] @ x[b, t] + mixer.q_experts.bias[e]
                p = (keys[seen] @ turned(q, t) / SIZE**0.5).softmax(-1)
                out = mixer.o_experts.weight[e] @ (p @ v[b, seen]) + mixer.o_experts.bias[e]
                total = total + routing.weights[b * T + t, slot] * out
            rows.append(total)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rope": True, "router": "sigmoid", "top_k": 3},
        {"routing": "capacity", "capacity_factor": 0.6, "min_capacity": 1},
        {"router": "noisy", "per_task": True, "top_k": 1},
    ],
)
def test_equals_one_query_at_a_time(settings):
    mixer, x, padding = build(**settings), tokens().requires_grad_(), some_padding()
    y = mixer(x, row_context(padding=padding))
    expected = by_hand(mixer, x, row_context(padding=padding))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    assert torch.equal(y[padding], torch.zeros_like(y[padding]))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = (x, *(p for p in mixer.parameters() if p.requires_grad))
    found = torch.autograd.grad((y * weights).sum(), inputs)
    oracle = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(found, oracle):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_an_only_expert_is_attention_with_one_head():
    mixer = build(num_experts=1, top_k=1, bias=False)
    x = tokens()
    q = (x @ mixer.q_experts.weight[0].T).unsqueeze(2)
    k, v = mixer.k_proj(x).unsqueeze(2), mixer.v_proj(x).unsqueeze(2)
    expected = kernels.attention(q, k, v, causal=False).flatten(2) @ mixer.o_experts.weight[0].T
    torch.testing.assert_close(mixer(x, row_context()), expected, rtol=0, atol=1e-12)


def test_language_model_looks_back_within_documents_and_generates():
    section = {"num_experts": 5, "top_k": 2, "head_dim": 8}
    config = small_config(pattern="e", attention_moe=section)
    model = small_model(config)
    mixer = model.blocks["0"].mixer
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])
    packed = build_context(documents)
    # Documents by themselves: positions begin anew.
    apart = [mixer(x[:1, a:b], Context()) for a, b in ((0, 3), (3, 7), (7, 9))]
    expected = torch.cat([torch.cat(apart, 1), mixer(x[1:], Context())])
    torch.testing.assert_close(mixer(x, packed), expected, rtol=0, atol=1e-12)
    model.eval()
    cache, logits = models.Cache(), []
    t = random_tokens(config, 2, 9)
    with torch.no_grad():
        for part in (t[:, :4], t[:, 4:5], t[:, 5:]):
            logits.append(model(part, cache=cache))
        torch.testing.assert_close(torch.cat(logits, 1), model(t), rtol=0, atol=1e-11)


@pytest.mark.parametrize("tp", [2, 3])
def test_slots_cut_over_ranks_add_up(tp):
    """Every weight is whole, its gradient a partial sum; losses count once."""
    settings = {"num_experts": 8, "top_k": 6, "rope": True, "losses": LOSSES}
    mixer, x = build(**settings), tokens()
    y = mixer(x, row_context())
    y.square().sum().backward()
    total, gradients = 0, {name: 0 for name, _ in mixer.named_parameters()}
    for rank in range(tp):
        local = build(**settings)
        for part in (local, local.router):
            part.shards = Shards()
            part.shards.start, part.shards.count = rank, tp
        part = local(x, row_context())
        (part * 2 * y.detach()).sum().backward()
        total = total + part.detach()
        gradients = {name: gradients[name] + p.grad for name, p in local.named_parameters()}
    torch.testing.assert_close(total, y.detach(), rtol=0, atol=1e-11)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_cut_over_ranks(distributed):
    section = {"num_experts": 6, "top_k": 4, "head_dim": 4, "bias": True, "losses": {"switch": 0.3}}
    check_cuts(small_config(pattern=["attention_moe+none"], attention_moe=section), distributed)


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_recomputation_gives_the_same_gradients_and_one_record(routing):
    found = {}
    for again in (False, True):
        mixer = build(routing=routing, capacity_factor=0.6, losses=LOSSES, rope=True)
        x, context = tokens().requires_grad_(), row_context()
        if again:
            mixer.attend = lambda *a, f=mixer.attend: checkpoint(f, *a, use_reentrant=False)
            y = checkpoint(mixer, x, context, use_reentrant=False, preserve_rng_state=False)
        else:
            y = mixer(x, context)
        y.square().sum().backward()
        found[again] = [x.grad, mixer.router.take_record(), *(p.grad for p in mixer.parameters())]
    for a, b in zip(found[False], found[True]):
        assert torch.equal(a, b)


def test_no_token_at_all():
    mixer, x = build(losses=LOSSES), tokens().requires_grad_()
    y = mixer(x, row_context(padding=torch.ones(3, 7, dtype=torch.bool)))
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert torch.equal(mixer.q_experts.weight.grad, torch.zeros_like(mixer.q_experts.weight))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_appended_experts_change_no_bit_of_an_old_tasks_output(router):
    old = build(router=router, rope=True)
    new = build(router=router, rope=True, num_experts=9, visible={"red": 6}, seed=4)
    state = new.state_dict()
    for name, value in old.state_dict().items():
        if "experts." in name or name == "router.expert_bias" or name == "router.weight":
            state[name][:6] = value
        else:
            state[name] = value
    for dtype in (torch.float64, torch.float32):
        new = new.to(dtype).eval()
        new.load_state_dict(state)
        x = tokens(4, 33).to(dtype)
        context = Context(tasks=torch.zeros(4, dtype=torch.int64))
        assert torch.equal(old.to(dtype).eval()(x, context), new(x, context))


def test_flops_are_those_that_run_and_parameters_those_that_are_met():
    mixer = build(bias=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer.eval()(tokens(1, 8), Context())
    assert counter.get_total_flops() == mixer.flops(8)
    assert mixer.active_parameters() == 6 * HIDDEN + 2 * 2 * SIZE * HIDDEN + 2 * SIZE * HIDDEN
    biased = build()
    assert biased.active_parameters() - mixer.active_parameters() == 2 * (SIZE + HIDDEN) + 2 * SIZE


def test_shapes_alone_and_initial_values():
    section = {"num_experts": 5, "top_k": 2, "head_dim": 8, "bias": True, "losses": {"switch": 0.1}}
    config = small_config(pattern="ee", attention_moe=section | {"num_experts_of": {1: 3}})
    with torch.device("meta"):
        model = models.build(config)
        x = torch.zeros(2, 9, dtype=torch.int64)
        model(x, targets=x).sum().backward()
    assert model.get_parameter("blocks.1.mixer.q_experts.weight").grad.shape == (3, 8, 24)
    real = models.build(config)
    models.initialize(real, 0)
    assert all(p.isfinite().all() for p in real.parameters())


def test_bf16_autocast():
    mixer, x = build(losses=LOSSES).float(), tokens().float()
    expected = mixer(x, row_context())
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x, row_context())
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.5)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 4}, r"model\.attention_moe\.top_k=12 exceeds the 4 experts of layer 0"),
        ({"router": "expert_choice"}, r"gives tokens any number of heads"),
        ({"head_dim": 5}, r"head_dim=5 must be a multiple of 2, pairs of channels"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ValidationError, match=words):
        tasks_config(pattern="e", attention_moe=settings)
