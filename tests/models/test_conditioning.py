"""What a denoiser is told, and how it acts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.models.common import small_config
from tests.models.denoisers import build_denoiser, denoiser_config, image_batch, packed_batch
from triptych import models
from triptych.models.conditioning import Modulation, modulate, time_features
from triptych.models.context import Context


def test_time_features_are_cosines_then_sines() -> None:
    times = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    found = time_features(times)
    assert found.shape == (3, 256)
    for n, t in enumerate(times.tolist()):
        for k in (0, 1, 64, 127):
            angle = t * 10000 ** (-k / 128)
            assert float(found[n, k]) == pytest.approx(math.cos(angle), abs=1e-12)
            assert float(found[n, 128 + k]) == pytest.approx(math.sin(angle), abs=1e-12)


def test_time_features_are_in_float32_at_least() -> None:
    """999.5 and 1000 are one number in bfloat16."""
    times = torch.tensor([999.5, 1000.0])
    found = time_features(times)
    assert found.dtype == torch.float32
    exact = time_features(times.double())
    assert float((found - exact).abs().max()) < 1e-4


def test_time_embedding_is_two_linears() -> None:
    model = build_denoiser(denoiser_config())
    times = torch.rand(2, 3, dtype=torch.float64) * 1000
    up, down = model.time_embedding.up, model.time_embedding.down
    inner = F.silu(time_features(times) @ up.weight.T + up.bias)
    torch.testing.assert_close(model.time_embedding(times), inner @ down.weight.T + down.bias)


def test_initial_standard_deviations() -> None:
    """Embeddings have init_std, modulation is zero."""
    config = denoiser_config(hidden_size=96, conditioning={"num_classes": 200}, init_std=0.03)
    model = build_denoiser(config, disturb=0.0)
    for name in ("time_embedding.up.weight", "time_embedding.down.weight", "label_embedding.weight"):
        assert 0.95 * 0.03 < float(model.get_parameter(name).detach().std()) < 1.05 * 0.03, name
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.endswith("bias"):
            assert torch.count_nonzero(parameter) == 0, name


@pytest.mark.parametrize(
    ("pattern", "branches"), [(["attention"], 2), (["attention+none"], 1), (["none+gelu"], 1)]
)
def test_a_block_has_shift_scale_and_gate_per_branch(pattern: list[str], branches: int) -> None:
    """x + gate * f(norm(x) (1 + scale) + shift), branch by branch."""
    config = denoiser_config(pattern=pattern, num_layers=1)
    model = build_denoiser(config)
    block = model.blocks["0"]
    assert block.modulation.proj.weight.shape == (3 * branches * 24, 24)
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    told = torch.randn(2, 1, 24, dtype=torch.float64)
    context = Context(conditioning=told)
    parts = (told @ block.modulation.proj.weight.T + block.modulation.proj.bias).chunk(3 * branches, dim=-1)
    expected = x
    functions = [f for f in (block.mixer, block.ffn) if f is not None]
    for branch, f in enumerate(functions):
        shift, scale, gate = parts[3 * branch : 3 * branch + 3]
        inner = F.layer_norm(expected, (24,), eps=1e-6) * (1 + scale) + shift
        expected = expected + gate * f(inner, context)
    torch.testing.assert_close(block(x, context), expected, rtol=0, atol=1e-12)


def test_low_rank_modulation_is_the_shared_one_and_its_own() -> None:
    """FiTv2: W_shared silu(c) + b + W_up (W_down silu(c)), of which a block of one branch takes the first
    half."""
    config = denoiser_config(
        modulation={"kind": "lora", "rank": 4}, pattern=["attention", "attention+none"], num_layers=2
    )
    model = build_denoiser(config)
    assert model.shared_modulation.proj.weight.shape == (6 * 24, 24)
    batch = image_batch(config)
    told = model.time_embedding(batch["times"][:, None]) + model.label_embedding(batch["labels"][:, None])
    acts = F.silu(told)
    shared = acts @ model.shared_modulation.proj.weight.T + model.shared_modulation.proj.bias
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, block in model.blocks.items():
        block.modulation.register_forward_hook(lambda m, args, y, name=name: seen.update({name: y}))
    model(batch["x"], times=batch["times"], labels=batch["labels"])
    for name, chunks in (("0", 6), ("1", 3)):
        own = model.blocks[name].modulation
        assert own.proj is None and own.down.weight.shape == (4, 24)
        low = acts @ own.down.weight.T + own.down.bias
        expected = low @ own.up.weight.T + own.up.bias + shared[..., : chunks * 24]
        torch.testing.assert_close(torch.cat(seen[name], dim=-1), expected, rtol=0, atol=1e-12)


def test_low_rank_modulation_starts_at_zero() -> None:
    config = denoiser_config(modulation={"kind": "lora", "rank": 4})
    model = build_denoiser(config, disturb=0.0)
    batch = image_batch(config)
    assert torch.count_nonzero(model(batch["x"], times=batch["times"], labels=batch["labels"])) == 0
    assert torch.count_nonzero(model.blocks["0"].modulation.down.weight) > 0


def test_tokens_of_packed_rows_have_what_their_image_is_told() -> None:
    config = denoiser_config(position="rope", attention={"num_heads": 2})
    modulation = build_denoiser(config).blocks["0"].modulation
    batch = packed_batch(config, [[(2, 2), (1, 3)], [(3, 1)]], length=8, places=2)
    told = torch.randn(2, 2, 24, dtype=torch.float64)
    images = batch["document_ids"].clamp(max=1)
    whole = modulation(Context(conditioning=told, images=images))
    each = modulation(Context(conditioning=told))
    for part, single in zip(whole, each):
        assert part.shape == (2, 8, 24)
        for row, token, image in ((0, 0, 0), (0, 3, 0), (0, 4, 1), (1, 2, 0)):
            assert torch.equal(part[row, token], single[row, image])


def test_a_rank_takes_its_tokens_alone() -> None:
    """What parallel/tensor.py sets where T is cut."""
    modulation = build_denoiser(denoiser_config()).blocks["0"].modulation
    context = Context(
        conditioning=torch.randn(2, 3, 24, dtype=torch.float64),
        images=torch.tensor([[0, 0, 1, 2], [2, 1, 1, 0]]),
    )
    whole = modulation(context)
    for rank in range(2):
        modulation.shard_rank, modulation.shard_count = rank, 2
        for part, expected in zip(modulation(context), whole):
            assert torch.equal(part, expected.chunk(2, dim=1)[rank])


def test_modulate() -> None:
    x, shift, scale = torch.randn(3, 2, 5, 4)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale) + shift)


@pytest.mark.parametrize("rank", [None, 3])
def test_flops_are_counted_as_torch_counts_them(rank: int | None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    modulation = Modulation(8, 6, rank).double()
    models.initialize(modulation, 0)
    context = Context(
        conditioning=torch.randn(1, 1, 8).double(), shared_modulation=torch.zeros(1, 1, 48).double()
    )
    with FlopCounterMode(display=False) as counter:
        modulation(context)
    assert modulation.flops() == counter.get_total_flops()


def test_text_is_projected_in_the_models_dtype() -> None:
    config = denoiser_config(
        pattern=["cross_attention"], conditioning={"kind": "text", "text_size": 7, "text_length": 3}
    )
    model = build_denoiser(config, dtype=torch.float32)
    text = torch.randn(2, 3, 7, dtype=torch.float16)
    found = model.text_projection(text)
    assert found.dtype == torch.float32
    weight, bias = model.text_projection.proj.weight, model.text_projection.proj.bias
    torch.testing.assert_close(found, text.float() @ weight.T + bias)


def test_a_dropped_text_is_the_projections_bias() -> None:
    """Classifier-free guidance's "no text": all zeros before the projection."""
    config = denoiser_config(
        pattern=["cross_attention"], conditioning={"kind": "text", "text_size": 7, "text_length": 3}
    )
    projection = build_denoiser(config).text_projection
    found = projection(torch.zeros(1, 3, 7, dtype=torch.float64))
    assert torch.equal(found, projection.proj.bias.expand(1, 3, -1))


def test_language_models_have_no_modulation() -> None:
    model = models.build(small_config())
    assert not [name for name, _ in model.named_parameters() if "modulation" in name]
