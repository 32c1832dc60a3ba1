"""The mixture against every expert computed for every token."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import random_tokens, small_config, small_model, window_of
from tests.models.regions import check_cuts
from tests.models.routing import HIDDEN, randomize, row_context, some_padding, tasks_config, tokens
from triptych import models
from triptych.models.balancing import RoutingSums
from triptych.models.context import Context
from triptych.models.feedforwards.moe import MoE
from triptych.models.sharding import Shards

LOSSES = {"switch": 0.3, "importance": 0.2, "z": 0.1, "mutual_information": 0.4}
UNLIKE = {"low_rank": 2, "rank": 4, "identity": 1}


def build(seed: int = 0, **settings) -> MoE:
    """In training mode, float64, of random weights; 4 full experts unless told."""
    expert = {"intermediate_size": 10, "bias": True} | settings.pop("expert", {})
    config = tasks_config(moe={"num_experts": 4, "expert": expert, **settings})
    moe = MoE(config, 1).double()
    randomize(moe, seed)
    return moe.train()


def full_expert(moe: MoE, e: int, x: torch.Tensor) -> torch.Tensor:
    p = {name: parameter[e] for name, parameter in moe.experts.named_parameters()}
    up = F.linear(x, p["up_proj"], p.get("up_bias"))
    if moe.experts.gate_proj is None:
        hidden = F.gelu(up, approximate="tanh")
    else:
        hidden = F.silu(F.linear(x, p["gate_proj"], p.get("gate_bias"))) * up
    return F.linear(hidden, p["down_proj"], p.get("down_bias"))


def all_experts(moe: MoE, x_NC: torch.Tensor) -> torch.Tensor:
    """(E, N, C): every expert for every token."""
    outputs = [full_expert(moe, e, x_NC) for e in range(moe.num_full)]
    if moe.low_rank is not None:
        low = zip(moe.low_rank.down_proj, moe.low_rank.up_proj)
        outputs += [x_NC @ down.T @ up.T for down, up in low]
    return torch.stack(outputs + [x_NC] * moe.num_identity)


def dense(moe: MoE, x: torch.Tensor, context: Context) -> torch.Tensor:
    """The same mixture, with the router's decisions, without sorting anything."""
    routing = moe.router(x, context)
    x_NC = x.flatten(0, 1)
    gates_NE = x_NC.new_zeros(x_NC.shape[0], moe.router.num_experts + 1)
    experts = torch.where(routing.experts < 0, moe.router.num_experts, routing.experts)
    gates_NE = gates_NE.scatter_add(1, experts, routing.weights)[:, :-1]
    y = torch.einsum("ne,enc->nc", gates_NE, all_experts(moe, x_NC)).view_as(x)
    if moe.shared is not None:
        other = moe.shared(x, context)
        if moe.coefficient is not None:
            c = moe.coefficient(x).softmax(-1)
            return c[..., :1] * y + c[..., 1:] * other
        return y + other
    return y


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"expert": {"kind": "gelu"}, "top_k": 1},
        {"expert": {"bias": False}, "router": "sigmoid", "scale": 2.5, "shared_experts": 2},
        {"router": "expert_choice"},
        {"router": "noisy", "per_task": True, "residual": True},
        {"routing": "capacity", "capacity_factor": 0.5, "min_capacity": 1, **UNLIKE, "top_k": 3},
        {"visible": {"red": 2}, **UNLIKE, "shared_experts": 1},
    ],
)
def test_equals_every_expert_for_every_token(settings):
    moe, x, padding = build(**settings), tokens().requires_grad_(), some_padding()
    # Each with a context of its own, so that each decides.
    y, expected = (f(x, row_context(padding=padding)) for f in (moe, lambda *a: dense(moe, *a)))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    learned = [p for p in moe.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * weights).sum(), (x, *learned))
    oracle = torch.autograd.grad((expected * weights).sum(), (x, *learned), materialize_grads=True)
    for a, b in zip(found, oracle):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_padding_gets_nothing_and_gives_nothing():
    moe, padding = build(), some_padding()
    x = tokens()
    y = moe(x, row_context(padding=padding))
    assert torch.equal(y[padding], torch.zeros_like(y[padding]))
    other = torch.where(padding.unsqueeze(-1), 1e3, x)
    assert torch.equal(moe(other, row_context(padding=padding)), y)


def test_all_tokens_to_one_expert():
    moe = build(top_k=1, losses=LOSSES)
    with torch.no_grad():
        moe.router.weight.copy_(torch.zeros(4, HIDDEN, dtype=torch.float64))
        moe.router.weight[2] = 100
    x = tokens().abs()
    y = moe(x, row_context())
    torch.testing.assert_close(y.flatten(0, 1), full_expert(moe, 2, x.flatten(0, 1)), rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for parameter in moe.experts.parameters():
        others = parameter.grad[[0, 1, 3]]
        assert torch.equal(others, torch.zeros_like(others)) and parameter.grad[2].abs().sum() > 0
    figures = moe.router.figures(moe.router.take_record())
    assert figures["load"].tolist() == [0, 0, 1, 0] and abs(figures["losses"]["switch"] - 4) < 1e-9


def test_no_token_at_all():
    """A batch of padding alone: zeros, and gradients of zero rather than none."""
    moe = build(losses=LOSSES, routing="capacity", **UNLIKE)
    x = tokens().requires_grad_()
    y = moe(x, row_context(padding=torch.ones(3, 7, dtype=torch.bool)))
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    for name, parameter in moe.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
@pytest.mark.parametrize("router", ["softmax", "noisy"])
def test_recomputation_gives_the_same_gradients_and_one_record(router, routing):
    load = {"load": 0.2} if router == "noisy" else {}
    settings = {
        "router": router,
        "routing": routing,
        "capacity_factor": 0.7,
        "losses": LOSSES | load,
        **UNLIKE,
    }
    found = {}
    for again in (False, True):
        moe, x, context = build(**settings), tokens().requires_grad_(), row_context(padding=some_padding())
        asked = []
        moe.router.batch.sum = lambda flat, asked=asked: asked.append(1) or flat
        moe.router.batch.gather = lambda part, asked=asked: asked.append(1) or part
        if again:
            y = checkpoint(moe, x, context, use_reentrant=False, preserve_rng_state=False)
        else:
            y = moe(x, context)
        y.square().sum().backward()
        record = moe.router.take_record()
        found[again] = [y, x.grad, record, *(p.grad for p in moe.parameters())]
        assert len(asked) == (3 if routing == "capacity" else 1)
    for a, b in zip(found[False], found[True]):
        assert torch.equal(a, b)


def test_losses_reach_the_gates_through_the_stream_and_change_no_output():
    plain, moe = build(), build(losses={"switch": 50.0})
    x = tokens()
    y = moe(x, row_context())
    assert torch.equal(y, plain(x, row_context()))
    y.sum().backward()
    plain(x, row_context()).sum().backward()
    assert not torch.allclose(moe.router.weight.grad, plain.router.weight.grad)
    assert torch.equal(moe.experts.up_proj.grad, plain.experts.up_proj.grad)


def test_switch_loss_evens_out_the_load():
    moe = build(losses={"switch": 1.0}, num_experts=6, top_k=1)
    x, spread = tokens(16, 8), []
    optimizer = torch.optim.Adam([moe.router.weight], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        # The gradient of the losses alone.
        (moe(x, row_context(rows=16)) * 0).sum().backward()
        optimizer.step()
        load = RoutingSums.unflatten(moe.router.take_record(), 3, 6).load
        spread.append(load.max().item() / load.mean().item())
    assert spread[-1] < 1.3 < 1.8 < spread[0]


@pytest.mark.parametrize("per_task", [True, False])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy"])
def test_appended_experts_change_no_bit_of_an_old_tasks_output(router, per_task):
    settings = {"router": router, "per_task": per_task, "shared_experts": 1}
    old = build(**settings)
    new = build(num_experts=7, visible={"red": 4, "green": 4}, seed=4, **settings)
    state = new.state_dict()
    for name, value in old.state_dict().items():
        if name == "router.weight":
            state[name][..., :4, :] = value
        elif name.startswith("experts.") or name == "router.expert_bias":
            state[name][:4] = value
        else:
            state[name] = value
    for dtype in (torch.float64, torch.float32):
        old, new = old.to(dtype).eval(), new.to(dtype).eval()
        new.load_state_dict(state)
        x = tokens(4, 33).to(dtype)
        context = Context(tasks=torch.tensor([0, 1, 1, 0]))
        assert torch.equal(old.to(dtype)(x, context), new(x, context))
        blue = new(x, Context(tasks=torch.full((4,), 2)))
        assert not torch.equal(blue, new(x, context))


@pytest.mark.parametrize(
    "settings",
    [
        {"losses": LOSSES, **UNLIKE, "residual": True},
        {"expert": {"kind": "gelu"}, "identity": 2, "shared_experts": 1, "losses": LOSSES},
        {"router": "expert_choice", "identity": 1, "losses": LOSSES},
    ],
)
def test_partial_sums_of_shards_add_up(settings):
    """The tables cut by hand over two tp ranks: outputs add up to the whole, gradients of gates too."""
    moe, x = build(**settings), tokens()
    y = moe(x, row_context())
    y.square().sum().backward()
    tables = {f"{path}." if path else "": getattr(part, "sharding", {}) for path, part in moe.named_modules()}
    cuts = {f"{path}{name}": cut for path, table in tables.items() for name, cut in table.items()}
    total, gates = 0, 0
    for rank in range(2):
        local = build(**settings)
        for path, part in local.named_modules():
            for name, value in list(part.named_parameters(recurse=False)):
                whole = f"{path}.{name}" if path else name
                cut = cuts.get(whole)
                value = value.detach()[window_of(cut, value.shape, 2, rank)].clone()
                if cut is not None and cut.kind in ("row_bias", "expert_row_bias") and rank:
                    value = value * 0
                setattr(part, name, torch.nn.Parameter(value))
        for part in (local, local.router):
            part.shards = Shards()
            part.shards.start, part.shards.count = rank, 2
        part = local(x, row_context())
        (part * 2 * y.detach()).sum().backward()
        total, gates = total + part.detach(), gates + local.router.weight.grad
    torch.testing.assert_close(total, y.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(gates, moe.router.weight.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "settings",
    [
        {"expert": {"intermediate_size": 10, "bias": True}, "residual": True},
        {
            "expert": {"intermediate_size": 10, "kind": "gelu"},
            "router": "sigmoid",
            "routing": "capacity",
            "top_k": 3,
            "shared_experts": 1,
            **UNLIKE,
        },
    ],
)
def test_cut_over_ranks(settings, distributed):
    losses = {"switch": 0.3, "z": 0.2}
    check_cuts(
        small_config(pattern=["none+moe"], moe={"num_experts": 4, "losses": losses, **settings}), distributed
    )


# ---- in a model


def test_language_model_learns_generates_and_counts():
    config = small_config(
        pattern=["mamba2+swiglu", "attention+moe"],
        moe={
            "num_experts": 5,
            "num_experts_of": {1: 3},
            "shared_experts": 1,
            "expert": {"intermediate_size": 20},
        },
    )
    model = small_model(config)
    x = random_tokens(config, 2, 9)
    model(x, targets=x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.get_parameter("blocks.1.ffn.experts.up_proj").shape == (3, 20, 24)
    model.eval()
    cache, logits = models.Cache(), []
    with torch.no_grad():
        for t in range(9):
            logits.append(model(x[:, t : t + 1], cache=cache))
        torch.testing.assert_close(torch.cat(logits, 1), model(x), rtol=0, atol=1e-11)
    count = models.parameter_count(config)
    one = 3 * 24 * 20
    assert count["total"] - count["active"] == (3 - 2) * one
    assert count["per_block"][1]["active"] == count["per_block"][1]["total"] - one


@pytest.mark.parametrize(
    "settings", [{}, {"shared_experts": 2}, {"residual": True, "expert": {"kind": "gelu"}}]
)
def test_flops_are_those_that_run(settings):
    moe = build(expert={"bias": False} | settings.pop("expert", {}), **settings)
    x = tokens(1, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe.eval()(x, Context())
    assert counter.get_total_flops() == moe.flops(8)


def test_active_parameters():
    moe = build(per_task=True, shared_experts=1, **UNLIKE)
    expert = 3 * HIDDEN * 10 + 2 * 10 + HIDDEN
    assert moe.active_parameters() == 7 * HIDDEN + 2 * expert + expert
    assert build(top_k=3, router="sigmoid").active_parameters() == 4 * (HIDDEN + 1) + 3 * expert


def test_shapes_alone():
    config = small_config(
        pattern=["attention+moe"], moe={"losses": {"switch": 0.1}, "routing": "capacity", **UNLIKE}
    )
    with torch.device("meta"):
        model = models.build(config)
        x = torch.zeros(2, 9, dtype=torch.int64)
        model(x, targets=x).sum().backward()
    assert model.get_parameter("blocks.0.ffn.experts.down_proj").grad.shape == (8, 24, 64)


def test_bf16_autocast():
    moe = build(losses=LOSSES, **UNLIKE, shared_experts=1).float()
    x = tokens().float()
    expected = moe(x, row_context())
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x, row_context())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.3)
    y.float().sum().backward()
    assert moe.router.weight.grad.dtype == torch.float32 and moe.router.weight.grad.isfinite().all()


def test_every_parameter_has_initial_values():
    moe = MoE(tasks_config(moe={"per_task": True, "router": "sigmoid", "residual": True, **UNLIKE}), 0)
    models.initialize(moe, 0)
    assert all(p.isfinite().all() for p in moe.parameters())
    assert torch.equal(moe.router.weight, torch.zeros(3, 11, HIDDEN))
    assert not moe.router.expert_bias.requires_grad
