"""Cross-attention against PyTorch's module, a loop over queries, and its own shards."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import on_ranks, set_parameter, small_config, window_of
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import init_table, initialize
from triptych.models.mixers import CrossAttention

WORDS = 5


def text_config(**overrides) -> DiffusionConfig:
    values = {
        "hidden_size": 24,
        "num_layers": 1,
        "pattern": "x",
        "in_channels": 3,
        "input_size": [6, 8],
        "conditioning": {"kind": "text", "text_size": 7, "text_length": WORDS},
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    }
    return DiffusionConfig.model_validate(values | overrides)


def build(config: DiffusionConfig | None = None) -> CrossAttention:
    """Initialised, then moved a little, so that biases and norms are not what they begin with."""
    mixer = CrossAttention(config or text_config(), 0).double()
    initialize(mixer, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return mixer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (2, 9, C) and text (2, 5, C)."""
    return torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(2, WORDS, 24, dtype=torch.float64)


def by_hand(mixer: CrossAttention, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """A loop over rows, heads and queries."""
    D = mixer.head_dim
    q, k, v = (
        torch.einsum("btc,oc->bto", source, linear.weight).unflatten(-1, (-1, D))
        for source, linear in ((x, mixer.q_proj), (memory, mixer.k_proj), (memory, mixer.v_proj))
    )
    if mixer.q_norm is not None:
        q, k = (
            (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            for t in (q, k)
        )
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            heads = []
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                heads.append(torch.softmax(k[b, :, g] @ q[b, t, h] / D**0.5, 0) @ v[b, :, g])
            rows.append(torch.cat(heads))
    return torch.stack(rows).unflatten(0, q.shape[:2]) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("form", [None, "reference"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_mixer_and_gradients_equal_a_loop_in_float64(qk_norm, form):
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": qk_norm, "form": form}
    mixer = build(text_config(attention=attention))
    x, memory = (t.requires_grad_() for t in inputs())
    found, expected = mixer(x, Context(memory=memory)), by_hand(mixer, x, memory)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    sources = [x, memory, *mixer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), sources),
        torch.autograd.grad((expected * weights).sum(), sources),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_mixer_with_biases_equals_pytorchs_multihead_attention():
    mixer = build(text_config(attention={"num_heads": 4, "bias": True}))
    their = torch.nn.MultiheadAttention(24, 4, bias=True, batch_first=True, dtype=torch.float64)
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    with torch.no_grad():
        their.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        their.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        their.out_proj.weight.copy_(mixer.o_proj.weight)
        their.out_proj.bias.copy_(mixer.o_proj.bias)
    x, memory = inputs()
    expected, _ = their(x, memory, memory, need_weights=False)
    torch.testing.assert_close(mixer(x, Context(memory=memory)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_partial_sums_of_shards_and_the_texts_gradient_add_up(tp, num_kv_heads):
    attention = {"num_heads": 4, "num_kv_heads": num_kv_heads, "bias": True, "qk_norm": True}
    config = text_config(attention=attention)
    mixer = build(config)
    x, memory = (t.requires_grad_() for t in inputs())
    weights = torch.randn(2, 9, 24, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}

    def shard(rank, group):
        local = build(config)
        for name, value in parameters.items():
            cut = mixer.sharding.get(name)
            value = value[window_of(cut, value.shape, tp, rank)]
            set_parameter(local, name, value * 0 if cut and cut.kind == "row_bias" and rank else value)
        y = local(x, Context(memory=memory))
        return y.detach(), *torch.autograd.grad((y * weights).sum(), [x, memory])

    y = mixer(x, Context(memory=memory))
    gradients = torch.autograd.grad((y * weights).sum(), [x, memory])
    parts = list(zip(*on_ranks(tp, shard)))
    for found, expected in zip(parts, [y.detach(), *gradients]):
        torch.testing.assert_close(sum(found), expected, rtol=1e-11, atol=1e-12)


def test_recomputed_core_and_dropout_are_those_of_the_plain_pass():
    mixer = build(text_config(attention={"num_heads": 4, "dropout": 0.4})).train()
    x, memory = (t.requires_grad_() for t in inputs())
    context = Context(memory=memory, sample_keys=torch.tensor([5, 6]))
    plain = mixer(x, context)
    gradients = torch.autograd.grad(plain.square().sum(), [x, memory])
    assert not torch.allclose(plain, mixer.eval()(x, context))
    (name,) = mixer.train().selective
    core = getattr(mixer, name)
    setattr(mixer, name, lambda *args: checkpoint(core, *args, use_reentrant=False))
    again = torch.autograd.grad(mixer(x, context).square().sum(), [x, memory])
    for ours, theirs in zip(again, gradients):
        assert torch.equal(ours, theirs)


def test_flops_and_shapes_on_the_meta_device():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mixer = CrossAttention(text_config(attention={"num_heads": 4}), 0)
        y = mixer(torch.empty(1, 9, 24), Context(memory=torch.empty(1, WORDS, 24)))
    assert y.shape == (1, 9, 24)
    assert mixer.flops(9) == counter.get_total_flops()


def test_every_parameter_has_an_initial_distribution():
    table = init_table(build(text_config(attention={"num_heads": 4, "bias": True})))
    assert table.keys() == {f"{p}_proj.{part}" for p in "qkvo" for part in ("weight", "bias")}


def test_without_a_text_it_is_refused():
    x, memory = inputs()
    with pytest.raises(
        ValueError, match="reads an embedded text, and this pass has none; give the model `text`"
    ):
        build()(x, Context())
    with pytest.raises(ValueError, match="one text per row, and packed rows hold several images"):
        build()(x, Context(memory=memory, cu_seqlens=torch.tensor([0, 4, 9, 18], dtype=torch.int32)))
    with pytest.raises(
        ValueError, match=r"model\.conditioning\.kind=class gives it none; use family: diffusion"
    ):
        text_config(conditioning={"kind": "class"})
    with pytest.raises(ValueError, match=r"model\.family=lm gives it none"):
        small_config(pattern=["cross_attention"])
    with pytest.raises(ValueError, match=r"num_kv_heads=3 does not divide model\.attention\.num_heads=4"):
        text_config(attention={"num_heads": 4, "num_kv_heads": 3})
