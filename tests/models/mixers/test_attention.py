"""Attention and its block against transformers' Llama, Qwen3 and Mistral, with the weights copied."""

import pytest
import torch

from tests.models.common import on_ranks, random_tokens, set_parameter, small_config, small_model, window_of
from triptych import models
from triptych.models.context import Context

transformers = pytest.importorskip("transformers")


class ExactRotary(torch.nn.Module):
    """cos and sin in float64; transformers computes them in fp32 whatever the model is."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x, position_ids, *args, **kwargs):
        angles = position_ids.double().unsqueeze(-1) * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def theirs(name: str, config: models.LanguageConfig, **extra) -> torch.nn.Module:
    config_class = getattr(transformers, f"{name}Config")
    settings = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.attention.num_heads,
        num_key_value_heads=config.attention.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn.intermediate_size,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
        **extra,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(settings).eval().double()
    model.model.rotary_emb = ExactRotary(config.head_dim, config.attention.rope_theta)
    return model


def copy_to(their: torch.nn.Module, ours: models.LanguageModel) -> None:
    """Our weights into their model."""
    table = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
    table["lm_head.weight"] = "embedding.weight" if ours.config.tie_embeddings else "head.weight"
    parts = {
        "self_attn": "mixer",
        "mlp": "ffn",
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    parameters = dict(ours.named_parameters())
    state = their.state_dict()
    for name in state:
        if name not in table:
            _, _, layer, part, *rest = name.split(".")
            table[name] = ".".join(["blocks", layer, parts[part], *rest])
        state[name] = parameters[table[name]].detach()
    their.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "attention", "extra"),
    [
        ("Llama", {}, {}),
        ("Llama", {"num_kv_heads": 1, "head_dim": None}, {}),
        ("Llama", {"num_kv_heads": 4, "bias": True}, {"attention_bias": True}),
        ("Qwen3", {"qk_norm": True}, {}),
        ("Mistral", {"window": 4}, {"sliding_window": 4}),
    ],
)
@pytest.mark.parametrize("tie", [False, True])
def test_logits_and_gradients_equal_transformers(name, attention, extra, tie):
    config = small_config(
        pattern="*",
        attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | attention,
        norm_eps=1e-6,
        tie_embeddings=tie,
    )
    ours = small_model(config)
    their = theirs(name, config, **extra)
    copy_to(their, ours)
    tokens = random_tokens(config, 2, 13)
    expected = their(tokens).logits
    # Their norms and softmax are in fp32.
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-5)
    nll = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens.flatten())
    nll.backward()
    ours(tokens, targets=tokens).mean().backward()
    torch.testing.assert_close(
        ours.get_parameter("blocks.0.mixer.k_proj.weight").grad,
        their.get_parameter("model.layers.0.self_attn.k_proj.weight").grad,
        rtol=0,
        atol=2e-5,
    )


def by_hand(mixer: torch.nn.Module, x: torch.Tensor, window: int | None) -> torch.Tensor:
    """One query at a time, in float64, without rotation."""
    (B, T, _), D = x.shape, mixer.head_dim
    q, k, v = ((x @ p.weight.T).view(B, T, -1, D) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    H, G = q.shape[2], k.shape[2]
    out = torch.zeros_like(q)
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(H):
            g = h // (H // G)
            scores = torch.einsum("bd,bsd->bs", q[:, t, h], k[:, first : t + 1, g]) / D**0.5
            out[:, t, h] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, first : t + 1, g])
    return out.flatten(-2) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("form", [None, "reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_mixer_equals_a_loop_in_float64(window, form):
    attention = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 7,
        "rope_theta": None,
        "window": window,
        "form": form,
    }
    config = small_config(pattern="*", attention=attention)
    mixer = small_model(config).blocks["0"].mixer
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, Context()), by_hand(mixer, x, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_partial_sums_of_shards_add_up(tp, num_kv_heads):
    """The sharding table, cut by hand: the shards' outputs add up to the whole's."""
    attention = {"num_heads": 4, "num_kv_heads": num_kv_heads, "head_dim": 8, "bias": True, "qk_norm": True}
    config = small_config(pattern="*", attention=attention)
    mixer = small_model(config).blocks["0"].mixer
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}

    def shard(rank, group):
        local = small_model(config).blocks["0"].mixer
        for name, value in parameters.items():
            cut = mixer.sharding.get(name)
            value = value[window_of(cut, value.shape, tp, rank)]
            set_parameter(local, name, value * 0 if cut and cut.kind == "row_bias" and rank else value)
        return local(x, Context())

    torch.testing.assert_close(sum(on_ranks(tp, shard)), mixer(x, Context()), rtol=0, atol=1e-12)


def test_dropout_of_probabilities_follows_heads_across_shards():
    attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "dropout": 0.4}
    config = small_config(pattern="*", attention=attention)
    mixer = small_model(config).blocks["0"].mixer.train()
    x, context = torch.randn(2, 9, 24, dtype=torch.float64), Context(sample_keys=torch.tensor([5, 6]))
    whole = mixer(x, context)
    assert not torch.allclose(whole, mixer.eval()(x, context))
    parts = []
    for rank in range(2):
        local = small_model(config).blocks["0"].mixer.train()
        local.dropout.shard_rank, local.dropout.shard_count = rank, 2
        for name, value in mixer.named_parameters():
            set_parameter(local, name, value[window_of(mixer.sharding.get(name), value.shape, 2, rank)])
        parts.append(local(x, context))
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12)
