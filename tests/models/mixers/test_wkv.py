"""Spatial mix and channel mix of Vision-RWKV against their formulas, and their shards."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import small_config
from tests.models.regions import Pair, check_cuts, context_of, gradients
from triptych import models
from triptych.models.context import Context, build_context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.feedforwards import ChannelMix
from triptych.models.init import init_table, initialize
from triptych.models.mixers import WKV
from triptych.models.scan import Scan

GRID = (3, 4)


def image_config(grid=GRID, *, hidden_size=24, pattern="wkv+channel_mix", layers=3, **wkv) -> DiffusionConfig:
    return DiffusionConfig.model_validate(
        {
            "hidden_size": hidden_size,
            "num_layers": layers,
            "pattern": [pattern],
            "in_channels": 3,
            "input_size": [side * 2 for side in grid],
            "position": "learned",
            "ffn": {"kind": "channel_mix", "intermediate_size": 40},
            "wkv": wkv,
        }
    )


def neighbours_by_hand(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Padded images, shifted: a quarter of the channels each from the left, the right, above and below."""
    images = F.pad(x.unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    H, W = grid
    left, right = images[:, 1:-1, 0:W], images[:, 1:-1, 2 : W + 2]
    above, below = images[:, 0:H, 1:-1], images[:, 2 : H + 2, 1:-1]
    size = x.shape[-1] // 4
    parts = [part[..., i * size : (i + 1) * size] for i, part in enumerate((left, right, above, below))]
    return torch.cat([*parts, images[:, 1:-1, 1:-1, 4 * size :]], -1).flatten(1, 2)


def wkv_by_hand(mixer: WKV, x: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
    """Token by token; as in the published code w and u are divided by the number of tokens."""

    def mixed(mu):
        return x if mu is None else mu * x + (1 - mu) * neighbours

    r = torch.sigmoid(mixed(mixer.mu_r) @ mixer.r_proj.weight.T)
    k, v = mixed(mixer.mu_k) @ mixer.k_proj.weight.T, mixed(mixer.mu_v) @ mixer.v_proj.weight.T
    T = x.shape[1]
    w, u = mixer.spatial_decay / T, mixer.spatial_first / T
    ys = []
    for t in range(T):
        distance = (torch.arange(T) - t).abs()[:, None]
        weights = torch.exp(k + torch.where(distance == 0, u, -(distance - 1) * w))
        ys.append((weights * v).sum(1) / weights.sum(1))
    return (r * torch.stack(ys, 1)) @ mixer.out_proj.weight.T


def channel_mix_by_hand(ffn: ChannelMix, x: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
    def mixed(mu):
        return x if mu is None else mu * x + (1 - mu) * neighbours

    k = (mixed(ffn.mu_k) @ ffn.k_proj.weight.T).clamp(min=0) ** 2
    return torch.sigmoid(mixed(ffn.mu_r) @ ffn.r_proj.weight.T) * (k @ ffn.v_proj.weight.T)


BY_HAND = {"wkv+none": wkv_by_hand, "none+channel_mix": channel_mix_by_hand}


def part_of(config: DiffusionConfig):
    pair = Pair(config)
    return pair.mixer or pair.ffn


@pytest.mark.parametrize("hidden_size", [24, 26])
@pytest.mark.parametrize("shift", ["quad", "none"])
@pytest.mark.parametrize("pattern", BY_HAND)
def test_part_and_gradients_equal_the_formula_in_float64(pattern, shift, hidden_size):
    config = image_config(pattern=pattern, shift=shift, hidden_size=hidden_size)
    part = part_of(config)
    x = torch.randn(2, 12, hidden_size, dtype=torch.float64, requires_grad=True)
    found, expected = part(x, context_of(config)), BY_HAND[pattern](part, x, neighbours_by_hand(x, GRID))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    sources = dict(part.named_parameters()) | {"x": x}
    assert ("mu_k" in sources) == (shift == "quad")
    for name, ours, theirs in zip(
        sources,
        torch.autograd.grad((found * weights).sum(), sources.values()),
        torch.autograd.grad((expected * weights).sum(), sources.values()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("grid", [(12,), (2, 2, 3)])
@pytest.mark.parametrize("pattern", BY_HAND)
def test_other_dimensions_share_the_channels_among_more_or_fewer_neighbours(pattern, grid):
    part = part_of(image_config(grid, pattern=pattern, hidden_size=25))
    x = torch.randn(2, 12, 25, dtype=torch.float64)
    size, cells = 25 // (2 * len(grid)), x.unflatten(1, grid)
    shifted = []
    for axis in reversed(range(len(grid))):
        for step in (1, -1):  # what is rolled forward is the neighbour before
            moved = cells.roll(step, axis + 1)
            moved.select(axis + 1, 0 if step == 1 else -1).zero_()
            shifted.append(moved[..., len(shifted) * size :][..., :size])
    neighbours = torch.cat([*shifted, cells[..., len(shifted) * size :]], -1).flatten(1, -2)
    found = part(x, Context(scan=Scan.of_grid(grid, "cpu")))
    torch.testing.assert_close(found, BY_HAND[pattern](part, x, neighbours), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", BY_HAND)
def test_packed_images_are_mixed_each_on_its_own(pattern):
    part = part_of(image_config(pattern=pattern))
    sizes = torch.tensor([[[3, 4], [2, 2]], [[2, 5], [0, 0]]])
    ids = torch.tensor([[0] * 12 + [1] * 4, [0] * 10 + [2] * 6])
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    context = Context(cu_seqlens=build_context(ids).cu_seqlens, scan=Scan.of_packed(sizes, ids))
    packed = part(x, context)
    for row, start, shape in [(0, 0, (3, 4)), (0, 12, (2, 2)), (1, 0, (2, 5))]:
        tokens = slice(start, start + math.prod(shape))
        alone = part(x[row : row + 1, tokens], Context(scan=Scan.of_grid(shape, "cpu")))
        torch.testing.assert_close(packed[row : row + 1, tokens], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", BY_HAND)
def test_routed_tokens_are_neither_neighbours_nor_weights(pattern):
    part = part_of(image_config(pattern=pattern))
    kept = torch.tensor([[0, 1, 4, 5, 11], [2, 3, 6, 7, 8]])
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    index = kept.unsqueeze(-1).expand(-1, -1, 24)
    there = torch.zeros(2, 12, 1, dtype=torch.float64).scatter(1, kept.unsqueeze(-1), 1.0)
    neighbours = neighbours_by_hand(x * there, GRID).gather(1, index)
    found = part(x.gather(1, index), Context(scan=Scan.of_grid(GRID, "cpu").route(kept)))
    expected = BY_HAND[pattern](part, x.gather(1, index), neighbours)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_initial_values_are_the_published_ones(layer):
    config = image_config()
    mixer, ffn = WKV(config, layer).double(), ChannelMix(config, layer).double()
    for part in (mixer, ffn):
        initialize(part, 0)
        assert init_table(part).keys() == dict(part.named_parameters()).keys()
    ratio_0_to_1, ratio_1_to_almost_0 = layer / 2, 1 - layer / 3
    places = [i / 24 for i in range(24)]
    published = {
        mixer.spatial_decay: [-5 + 8 * (i / 23) ** (0.7 + 1.3 * ratio_0_to_1) for i in range(24)],
        mixer.spatial_first: [math.log(0.3) + ((i + 1) % 3 - 1) * 0.5 for i in range(24)],
        mixer.mu_k: [p**ratio_1_to_almost_0 for p in places],
        mixer.mu_v: [p**ratio_1_to_almost_0 + 0.3 * ratio_0_to_1 for p in places],
        mixer.mu_r: [p ** (0.5 * ratio_1_to_almost_0) for p in places],
        ffn.mu_k: [p**ratio_1_to_almost_0 for p in places],
        ffn.mu_r: [p**ratio_1_to_almost_0 for p in places],
    }
    for parameter, values in published.items():
        torch.testing.assert_close(parameter.tolist(), values, rtol=0, atol=1e-14)


def test_parameters_are_those_of_the_published_block():
    config = image_config(hidden_size=384).model_copy(
        update={"ffn": image_config().ffn.model_copy(update={"intermediate_size": None})}
    )
    with torch.device("meta"):
        mixer, ffn = WKV(config, 0), ChannelMix(config, 0)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * 384**2 + 5 * 384
    assert sum(p.numel() for p in ffn.parameters()) == (2 * 4 + 1) * 384**2 + 2 * 384


@pytest.mark.parametrize("shift", ["quad", "none"])
def test_two_ranks_find_the_same(shift, distributed):
    check_cuts(image_config(shift=shift), distributed)


def test_the_recomputed_core_changes_nothing():
    plain, again = gradients(image_config()), gradients(image_config(), recompute="selective")
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def test_flops_on_the_meta_device():
    config = image_config()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        parts = (WKV(config, 0), ChannelMix(config, 0))
        for part in parts:
            y = part(torch.empty(1, 12, 24), Context(scan=Scan.of_grid(GRID, "meta")))
            assert y.shape == (1, 12, 24)
    assert sum(part.flops(12) for part in parts) == counter.get_total_flops()


@pytest.mark.parametrize("part", [WKV, ChannelMix])
def test_bf16_under_autocast(part):
    config = image_config()
    exact, half = part(config, 0).double(), part(config, 0)
    initialize(exact, 0)
    initialize(half, 0)
    x = torch.randn(2, 12, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = half(x.bfloat16(), context_of(config))
    assert y.dtype == torch.bfloat16
    expected = exact(x.double(), context_of(config))
    assert (y.double() - expected).norm() < 2**-5 * expected.norm()


def test_decay_parameters_stay_in_fp32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = WKV(image_config(), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mixer.k_proj.weight.dtype == torch.bfloat16
    assert {mixer.spatial_decay.dtype, mixer.spatial_first.dtype} == {torch.float32}


def test_channel_mix_without_shift_serves_language_models():
    config = small_config(pattern=["mamba2+channel_mix"], wkv={"shift": "none"}, num_layers=1)
    model = models.build(config).double()
    models.initialize(model, 0)
    ffn, x = model.blocks["0"].ffn, torch.randn(1, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(ffn(x, Context()), channel_mix_by_hand(ffn, x, x), rtol=0, atol=1e-12)


def test_configurations_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"has wkv, which looks at tokens on both sides, and model\.family=lm"
    ):
        small_config(pattern=["wkv"])
    with pytest.raises(ValueError, match=r"gives channel_mix the neighbours .* use model\.wkv\.shift=none"):
        small_config(pattern=["mamba2+channel_mix"])
    with pytest.raises(ValueError, match=r"model\.ffn\.bias=true with channel_mix, which has no biases"):
        DiffusionConfig.model_validate(
            {"hidden_size": 24, "num_layers": 1, "pattern": ["wkv+channel_mix"], "in_channels": 3,
             "input_size": [6, 8]}
        )  # fmt: skip
