import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import random_tokens, small_config, small_model
from triptych import models
from triptych.models.context import Context

SIZES = {
    "hidden_size": 64,
    "vocab_size": 100,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 24},
    "mamba2": {"state_size": 16, "head_dim": 32, "num_groups": 2, "chunk_size": 32},
    "ffn": {"intermediate_size": 96},
}
KINDS = ["mamba2+none", "mamba2+swiglu", "attention+none", "attention+gelu", "none+swiglu", "none+gelu"]


def by_formula(kind: str) -> int:
    D = 64
    parts = {
        "none": 0,
        "attention": D + D * 24 * (4 + 2 + 2) + 4 * 24 * D,
        # z, x: 128; b, c: 2 * 16; dt: 4 heads; convolutions with 4 taps and a bias; a, d, dt_bias; norm; out.
        "mamba2": D + D * (128 + 128 + 32 + 32 + 4) + (128 + 32 + 32) * 5 + 3 * 4 + 128 + 128 * D,
        "swiglu": D + 3 * D * 96,
        "gelu": D + 2 * D * 96,
    }
    return sum(parts[part] for part in kind.split("+"))


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_equal_the_formula(tie):
    config = small_config(**SIZES, num_layers=7, pattern=KINDS, tie_embeddings=tie)
    count = models.parameter_count(config)
    assert [(block["kind"], block["total"]) for block in count["per_block"]] == [
        (kind, by_formula(kind)) for kind in [*KINDS, KINDS[0]]
    ]
    expected = sum(map(by_formula, [*KINDS, KINDS[0]])) + 64 + 6400 * (1 if tie else 2)
    assert count["total"] == count["active"] == expected
    assert count["parts"] == {"embedding": 6400, "norm": 64, "head": 0 if tie else 6400}
    assert count["total"] == sum(p.numel() for p in models.build(config).parameters())
    for block in count["per_block"]:
        assert block["mixer"] + block["ffn"] + block["other"] == block["total"] == block["active"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 192])
def test_flops_of_each_kind_of_block_equal_those_counted(kind, length):
    config = small_config(**SIZES, num_layers=1, pattern=[kind])
    block = small_model(config, dtype=torch.float32).blocks["0"]
    x = torch.randn(2, length, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = block(x, Context())
    per_token = models.flops_per_token(config, length)
    assert per_token["per_kind"][kind] * 2 * length == pytest.approx(counter.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # Twice the forward pass; what scans and attention recompute in backward comes on top.
    assert 1.95 < counter.get_total_flops() / (per_token["per_kind"][kind] * 2 * length) < 3.2


def test_flops_of_the_model_are_those_of_its_parts():
    config = small_config(**SIZES, num_layers=7, pattern=KINDS)
    count = models.flops_per_token(config, 64)
    model = small_model(config, dtype=torch.float32)
    tokens = random_tokens(config, 1, 64)
    # Without gradients: with them the cross-entropy makes its own in forward.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, targets=tokens)
    assert count["total"] * 64 == pytest.approx(counter.get_total_flops(), rel=0.02)
    kinds = sum(count["per_kind"][block.kind] for block in model.blocks.values())
    assert count["total"] == pytest.approx(kinds + count["parts"]["head"])


def test_counting_a_large_model_allocates_nothing():
    config = small_config(
        hidden_size=8192, num_layers=80, vocab_size=128_000, pattern="*",
        attention={"num_heads": 64, "num_kv_heads": 8}, ffn={"intermediate_size": 28_672},
    )  # fmt: skip
    # Llama 3 70B but for its vocabulary of 128,256.
    assert models.parameter_count(config)["total"] == 70_553_706_496 - 2 * 256 * 8192
