"""The mLSTM mixer against a loop over time in float64, its scan orders, cache and shards."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import (
    ThreadShards,
    on_ranks,
    random_tokens,
    set_parameter,
    small_config,
    small_model,
    window_of,
)
from tests.models.regions import Pair, check_cuts, context_of, gradients
from triptych import models
from triptych.models.context import Context, build_context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import init_table, initialize
from triptych.models.mixers import MLSTM
from triptych.models.scan import Scan
from triptych.models.scan_order import inverse, scan_order
from triptych.parallel.recompute import apply_recompute

GRID = (3, 4)
SETTINGS = {"num_heads": 4, "conv_kernel": 3, "qkv_block": 3, "chunk_size": 8}


def image_config(**scan) -> DiffusionConfig:
    return DiffusionConfig.model_validate(
        {
            "hidden_size": 24,
            "num_layers": 3,
            "pattern": ["mlstm+none"],
            "in_channels": 3,
            "input_size": [side * 2 for side in GRID],
            "mlstm": SETTINGS,
            "scan": scan or {"orders": ["raster"]},
        }
    )


def text_config(**settings) -> models.LanguageConfig:
    return small_config(pattern=["mlstm+none"], norm_eps=1e-6, mlstm=SETTINGS | settings)


def build(config=None, layer: int = 0, dtype: torch.dtype = torch.float64) -> MLSTM:
    """Initialised, then moved a little; the same values whatever the scan orders are."""
    mixer = MLSTM(config or text_config(), layer).to(dtype)
    initialize(mixer, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(mixer.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return mixer


def blocks_by_hand(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ torch.block_diag(*weight).T


def by_hand(mixer: MLSTM, x: torch.Tensor) -> torch.Tensor:
    """Equation by equation, one token after the other, nothing stabilised."""
    eps = mixer.eps
    inner, heads = mixer.skip.shape[0], mixer.forget_bias.shape[0]
    z, x = x @ mixer.z_proj.weight.T, x @ mixer.x_proj.weight.T
    taps = mixer.conv_x.weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    u = sum(padded[:, k : k + x.shape[1]] * mixer.conv_x.weight[:, k] for k in range(taps))
    u = u + mixer.conv_x.bias
    u = u * torch.sigmoid(u)
    q, k = blocks_by_hand(mixer.q_proj.weight, u), blocks_by_hand(mixer.k_proj.weight, u)
    v = blocks_by_hand(mixer.v_proj.weight, x)
    gates = (
        torch.cat([q, k, v], -1)
        @ torch.cat([mixer.q_gates.weight, mixer.k_gates.weight, mixer.v_gates.weight], 1).T
    )
    i = torch.exp(gates[..., :heads] + mixer.input_bias)
    f = torch.sigmoid(gates[..., heads:] + mixer.forget_bias)
    size = inner // heads
    outs = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        c, n = x.new_zeros(x.shape[0], size, size), x.new_zeros(x.shape[0], size)
        ys = []
        for t in range(x.shape[1]):
            q_t, k_t, v_t = (y[:, t, part] for y in (q / size**0.5, k, v))
            f_t, i_t = f[:, t, h, None], i[:, t, h, None]
            c = f_t[..., None] * c + i_t[..., None] * v_t[:, :, None] * k_t[:, None, :]
            n = f_t * n + i_t * k_t
            y = (c @ q_t[..., None])[..., 0] / (n * q_t).sum(-1, keepdim=True).abs().clamp(min=1)
            centred = y - y.mean(-1, keepdim=True)
            ys.append(centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt())
        outs.append(torch.stack(ys, 1))
    y = torch.cat(outs, -1) * mixer.norm_weight + mixer.skip * u
    return (y * z * torch.sigmoid(z)) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 3, 21])
def test_mixer_and_gradients_equal_a_loop_in_float64(length):
    mixer = build()
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    found, expected = mixer(x, Context()), by_hand(mixer, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    weights = torch.randn_like(found)
    sources = dict(mixer.named_parameters()) | {"x": x}
    for name, ours, theirs in zip(
        sources,
        torch.autograd.grad((found * weights).sum(), sources.values()),
        torch.autograd.grad((expected * weights).sum(), sources.values()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_parameters_are_those_of_the_published_mixer():
    config = small_config(hidden_size=192, pattern=["mlstm+none"], mlstm={})
    with torch.device("meta"):
        mixer = MLSTM(config, 0)
    inner, heads, taps, block = 384, 4, 4, 4
    published = {
        "proj_up": 2 * inner * 192,
        "q, k and v": 3 * inner * block,
        "conv": inner * taps + inner,
        "igate and fgate": 2 * (3 * inner * heads + heads),
        "outnorm": inner,
        "learnable_skip": inner,
        "proj_down": inner * 192,
    }
    assert sum(p.numel() for p in mixer.parameters()) == sum(published.values())


def test_initial_values_are_the_published_ones():
    mixer = MLSTM(text_config(), 0).double()
    initialize(mixer, 0)
    assert init_table(mixer).keys() == dict(mixer.named_parameters()).keys()
    expected = torch.linspace(3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer.forget_bias.detach(), expected, rtol=0, atol=1e-15)
    for gate in (mixer.q_gates, mixer.k_gates, mixer.v_gates):
        assert not gate.weight.any()
    assert 0 < mixer.input_bias.abs().max() < 0.5
    # Of 144 draws; the standard deviation is within 15 %.
    assert mixer.q_proj.weight.std().item() == pytest.approx((2 / 15) ** 0.5, rel=0.15)


def test_packed_documents_equal_separate_ones():
    mixer = build()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    ids = torch.tensor([[0] * 7 + [1] * 13, [0] * 1 + [1] * 9 + [2] * 10])
    packed = mixer(x, build_context(ids))
    for row, first, last in [(0, 0, 7), (0, 7, 20), (1, 0, 1), (1, 1, 10), (1, 10, 20)]:
        alone = mixer(x[row : row + 1, first:last], Context())
        torch.testing.assert_close(packed[row : row + 1, first:last], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 6, 5]])
@torch.no_grad()
def test_logits_with_a_cache_equal_the_parallel_form(pieces):
    config = small_config(pattern="ll*", num_layers=3, mlstm=SETTINGS)
    model = small_model(config).eval()
    tokens = random_tokens(config, 3, 20)
    cache = models.Cache()
    logits = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-9)
    assert {name: tuple(t.shape) for name, t in cache.layer(0).items()} == {
        "conv_x": (3, 48, 2),
        "memory": (3, 4, 12, 13),
        "memory_log": (3, 4),
    }


@pytest.mark.parametrize("name", ["raster+reverse", "column", "hilbert"])
def test_a_scan_order_is_a_permutation_around_the_raster_scan(name):
    scanned, raster = build(image_config(orders=[name])), build()
    raster.load_state_dict(scanned.state_dict())
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    order = scan_order(name, GRID)
    found = scanned(x, Context(scan=Scan.of_grid(GRID, "cpu")))
    expected = raster(x[:, order], Context())[:, inverse(order)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert not torch.allclose(found, raster(x, Context()), atol=1e-3)


def test_directions_alternate_from_layer_to_layer():
    names = ["raster", "raster+reverse"]
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    context = Context(scan=Scan.of_grid(GRID, "cpu"))
    alone = [build(image_config(orders=[name]))(x, context) for name in names]
    for layer in (0, 1, 2):
        cycled = build(image_config(orders=names), layer)(x, context)
        torch.testing.assert_close(cycled, alone[layer % 2], rtol=0, atol=1e-11)
    merged = build(image_config(orders=names, merge="sum"))(x, context)
    torch.testing.assert_close(merged, sum(alone) / 2, rtol=0, atol=1e-11)


def test_a_learned_token_stands_behind_each_line():
    mixer = build(image_config(orders=["raster"], line_ends=True))
    plain = MLSTM(text_config(), 0).double()
    plain.load_state_dict({n: v for n, v in mixer.state_dict().items() if n != "pad_token"})
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    places = [0, 1, 2, 3, 12, 4, 5, 6, 7, 12, 8, 9, 10, 11, 12]
    padded = torch.cat([x, mixer.pad_token.expand(1, 1, -1)], 1)[:, places]
    expected = plain(padded, Context())[:, [i for i, place in enumerate(places) if place < 12]]
    found = mixer(x, Context(scan=Scan.of_grid(GRID, "cpu")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    (gradient,) = torch.autograd.grad(found.sum(), mixer.pad_token)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("tp", [2, 4])
def test_partial_sums_and_gradients_of_shards_add_up(tp):
    """The sharding table, and the sum inside the region in both directions."""
    mixer = build()
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 9, 24, dtype=torch.float64)
    names = [name for name, _ in mixer.named_parameters()]
    assert mixer.sharding.keys() == set(names)

    def shard(rank, group):
        local = build()
        for name in names:
            value = mixer.get_parameter(name).detach()
            set_parameter(local, name, value[window_of(mixer.sharding[name], value.shape, tp, rank)])
        local.shards = ThreadShards(group, rank, start=rank)
        y = local(x, Context())
        sources = [x, *(local.get_parameter(name) for name in names)]
        return y.detach(), *torch.autograd.grad((y * weights).sum(), sources)

    y = mixer(x, Context())
    dx, *expected = torch.autograd.grad((y * weights).sum(), [x, *map(mixer.get_parameter, names)])
    ys, dxs, *parts = zip(*on_ranks(tp, shard))
    torch.testing.assert_close(sum(ys), y.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(sum(dxs), dx, rtol=1e-9, atol=1e-10)
    for name, found, whole in zip(names, parts, expected):
        joined = torch.cat(found, 1 if mixer.sharding[name].kind == "row" else 0)
        torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("images", [False, True])
def test_two_ranks_find_the_same(images, distributed):
    config = image_config(orders=["raster+reverse"], line_ends=True) if images else text_config()
    check_cuts(config, distributed)


def test_the_recomputed_core_changes_nothing():
    config = image_config(orders=["raster", "raster+reverse"], merge="sum")
    plain, again = gradients(config), gradients(config, recompute="selective")
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    inner = 2 * 2 * 12 * 48
    # x and z, of both scans, ahead of the core.
    assert kept_sizes(config, "selective").count(inner) == 2
    assert kept_sizes(config, "none").count(inner) > 8


def kept_sizes(config, recompute):
    """Sizes of what autograd keeps, parameters left out."""
    pair = Pair(config)
    apply_recompute(pair, recompute)
    held = {p.untyped_storage().data_ptr() for p in pair.parameters()}
    kept = {}

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in held:
            kept[pointer] = tensor.numel()
        return tensor

    x = torch.randn(2, 12, 24, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = pair(x, context_of(config))
    y.sum().backward()
    return list(kept.values())


@pytest.mark.parametrize("scan", [{"orders": ["column"]}, {"orders": ["raster", "column"], "merge": "sum"}])
def test_flops_on_the_meta_device(scan):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mixer = MLSTM(image_config(**scan), 0)
        y = mixer(torch.empty(1, 12, 24), Context(scan=Scan.of_grid(GRID, "meta")))
    assert y.shape == (1, 12, 24)
    assert mixer.flops(12) == counter.get_total_flops()


def test_bf16_under_autocast():
    exact, mixer = build(), build(dtype=torch.float32)
    x = torch.randn(2, 30, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, Context())
    assert y.dtype == torch.bfloat16
    expected = exact(x.double(), Context())
    assert (y.double() - expected).norm() < 2**-5 * expected.norm()


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match=r"model\.mlstm\.expand=1\.3 times model\.hidden_size=24"):
        text_config(expand=1.3)
    with pytest.raises(ValueError, match=r"model\.mlstm\.num_heads=5 does not divide .*=48; use one of"):
        text_config(num_heads=5)
    with pytest.raises(ValueError, match=r"model\.mlstm\.qkv_block=5 does not divide channels per head"):
        text_config(qkv_block=5)
