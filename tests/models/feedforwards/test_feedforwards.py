import pytest
import torch
import torch.nn.functional as F

from tests.models.common import set_parameter, small_config, small_model, window_of
from triptych import models
from triptych.models.context import Context
from triptych.models.feedforwards.swiglu import default_intermediate_size


def build(kind: str) -> torch.nn.Module:
    config = small_config(pattern="*", ffn={"kind": kind, "intermediate_size": 40, "bias": True})
    return small_model(config).blocks["0"].ffn


def test_swiglu_equals_its_equation():
    ffn = build("swiglu")
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    gate = F.linear(x, ffn.gate_proj.weight, ffn.gate_proj.bias)
    hidden = gate * torch.sigmoid(gate) * F.linear(x, ffn.up_proj.weight, ffn.up_proj.bias)
    expected = F.linear(hidden, ffn.down_proj.weight, ffn.down_proj.bias)
    torch.testing.assert_close(ffn(x, Context()), expected, rtol=0, atol=1e-12)


def test_gelu_equals_its_equation():
    ffn = build("gelu")
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    u = F.linear(x, ffn.up_proj.weight, ffn.up_proj.bias)
    hidden = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    expected = F.linear(hidden, ffn.down_proj.weight, ffn.down_proj.bias)
    torch.testing.assert_close(ffn(x, Context()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_partial_sums_of_shards_add_up(kind):
    ffn = build(kind)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    total = torch.zeros_like(x)
    for rank in range(4):
        local = build(kind)
        for name, value in ffn.named_parameters():
            cut = ffn.sharding[name]
            value = value[window_of(cut, value.shape, 4, rank)]
            set_parameter(local, name, value * 0 if cut.kind == "row_bias" and rank else value)
        total += local(x, Context())
    torch.testing.assert_close(total, ffn(x, Context()), rtol=0, atol=1e-12)


def test_default_sizes():
    assert [default_intermediate_size(n) for n in (64, 768, 4096)] == [192, 2048, 10944]
    for kind, rows in [("swiglu", 64), ("gelu", 96)]:
        model = models.build(small_config(ffn={"kind": kind}))
        assert model.get_parameter("blocks.0.ffn.up_proj.weight").shape[0] == rows
