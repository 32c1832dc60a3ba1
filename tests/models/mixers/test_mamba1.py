"""The Mamba-1 mixer against transformers', a loop over time in float64, its scan orders and its shards."""

import math

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
from tests.models.regions import Pair, check_cuts, gradients
from triptych import models
from triptych.models.context import Context, build_context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import init_table, initialize
from triptych.models.mixers import Mamba1
from triptych.models.scan import Scan
from triptych.models.scan_order import inverse, line_ends, scan_order

GRID = (3, 4)
SETTINGS = {"state_size": 5, "dt_rank": 3, "conv_kernel": 4, "chunk_size": 8}


def image_config(**scan) -> DiffusionConfig:
    return DiffusionConfig.model_validate(
        {
            "hidden_size": 24,
            "num_layers": 3,
            "pattern": ["mamba1+none"],
            "in_channels": 3,
            "input_size": [side * 2 for side in GRID],
            "mamba1": SETTINGS,
            "scan": scan or {"orders": ["raster"]},
        }
    )


def text_config(**settings) -> models.LanguageConfig:
    return small_config(pattern=["mamba1+none"], mamba1=SETTINGS | settings)


def build(config=None, layer: int = 0, dtype: torch.dtype = torch.float64) -> Mamba1:
    """Initialised, then moved a little; the same values whatever the scan orders are."""
    mixer = Mamba1(config or text_config(), layer).to(dtype)
    initialize(mixer, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(mixer.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return mixer


def by_hand(mixer: Mamba1, x: torch.Tensor) -> torch.Tensor:
    """Equation by equation, one token after the other."""
    z, u = x @ mixer.z_proj.weight.T, x @ mixer.x_proj.weight.T
    taps = mixer.conv_x.weight.shape[1]
    padded = F.pad(u, (0, 0, taps - 1, 0))
    u = sum(padded[:, k : k + u.shape[1]] * mixer.conv_x.weight[:, k] for k in range(taps))
    u = u + mixer.conv_x.bias
    u = u * torch.sigmoid(u)
    b, c = u @ mixer.b_proj.weight.T, u @ mixer.c_proj.weight.T
    dt = u @ mixer.dt_down.weight.T @ mixer.dt_up.weight.T + mixer.dt_bias
    dt = torch.log1p(torch.exp(dt))
    state = u.new_zeros(u.shape[0], u.shape[2], b.shape[2])
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(-torch.exp(mixer.a_log) * dt[:, t, :, None])
        state = decay * state + (dt[:, t] * u[:, t])[:, :, None] * b[:, t, None, :]
        ys.append((state * c[:, t, None, :]).sum(-1) + mixer.d * u[:, t])
    y = torch.stack(ys, 1) * z * torch.sigmoid(z)
    return y @ mixer.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 3, 21])
def test_mixer_and_gradients_equal_a_loop_in_float64(length):
    mixer = build()
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    found, expected = mixer(x, Context()), by_hand(mixer, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(found)
    sources = dict(mixer.named_parameters()) | {"x": x}
    for name, ours, theirs in zip(
        sources,
        torch.autograd.grad((found * weights).sum(), sources.values()),
        torch.autograd.grad((expected * weights).sum(), sources.values()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_mixer_and_gradients_equal_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    ours = build(dtype=torch.float32)
    settings = transformers.MambaConfig(
        hidden_size=24, state_size=5, time_step_rank=3, conv_kernel=4, expand=2, use_bias=False,
        use_conv_bias=True, num_hidden_layers=1,
    )  # fmt: skip
    their = MambaMixer(settings, layer_idx=0).eval()
    # Their order: x, then z; dt, then b and c.
    their.load_state_dict(
        {
            "in_proj.weight": torch.cat([ours.x_proj.weight, ours.z_proj.weight]).detach(),
            "conv1d.weight": ours.conv_x.weight.detach().unsqueeze(1),
            "conv1d.bias": ours.conv_x.bias.detach(),
            "x_proj.weight": torch.cat([m.weight for m in (ours.dt_down, ours.b_proj, ours.c_proj)]).detach(),
            "dt_proj.weight": ours.dt_up.weight.detach(),
            "dt_proj.bias": ours.dt_bias.detach(),
            "A_log": ours.a_log.detach(),
            "D": ours.d.detach(),
            "out_proj.weight": ours.out_proj.weight.detach(),
        }
    )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in their.parameters())
    x = torch.randn(2, 21, 24, requires_grad=True)
    # Older releases have a form for the CPU beside forward.
    expected, y = getattr(their, "slow_forward", their)(x), ours(x, Context())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(y)
    pairs = [(x, x), (ours.a_log, their.A_log), (ours.d, their.D), (ours.dt_bias, their.dt_proj.bias)]
    pairs += [(ours.dt_up.weight, their.dt_proj.weight), (ours.out_proj.weight, their.out_proj.weight)]
    for mine, other in pairs:
        (a,) = torch.autograd.grad((y * weights).sum(), mine, retain_graph=True)
        (b,) = torch.autograd.grad((expected * weights).sum(), other, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("hidden", "rank"), [(768, 48), (1024, 64), (24, 2)])
def test_parameters_are_those_of_the_published_mixer(hidden, rank):
    with torch.device("meta"):
        mixer = Mamba1(small_config(hidden_size=hidden, pattern=["mamba1+none"]), 0)
    inner, states, taps = 2 * hidden, 16, 4
    published = {
        "in_proj": 2 * inner * hidden,
        "conv": inner * taps + inner,
        "x_proj": inner * (rank + 2 * states),
        "dt_proj": rank * inner + inner,
        "A_log": inner * states,
        "D": inner,
        "out_proj": inner * hidden,
    }
    assert sum(p.numel() for p in mixer.parameters()) == sum(published.values())


def test_initial_values_are_the_published_ones():
    mixer = Mamba1(text_config(state_size=16), 0).double()
    initialize(mixer, 0)
    assert init_table(mixer).keys() == dict(mixer.named_parameters()).keys()
    expected = torch.arange(1, 17, dtype=torch.float64).log().expand(48, 16)
    torch.testing.assert_close(mixer.a_log.detach(), expected, rtol=0, atol=1e-15)
    assert torch.equal(mixer.d, torch.ones(48, dtype=torch.float64))
    steps = F.softplus(mixer.dt_bias)
    assert 0.001 <= steps.min() < 0.003 and 0.03 < steps.max() <= 0.1
    bound = 3**-0.5
    assert 0.9 * bound < mixer.dt_up.weight.abs().max() <= bound
    # Of a uniform distribution; 144 draws are within 15 % of it.
    assert mixer.dt_up.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_packed_documents_equal_separate_ones():
    mixer = build()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    ids = torch.tensor([[0] * 7 + [1] * 13, [0] * 1 + [1] * 9 + [2] * 10])
    packed = mixer(x, build_context(ids))
    for row, first, last in [(0, 0, 7), (0, 7, 20), (1, 0, 1), (1, 1, 10), (1, 10, 20)]:
        alone = mixer(x[row : row + 1, first:last], Context())
        torch.testing.assert_close(packed[row : row + 1, first:last], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 6, 5]])
@torch.no_grad()
def test_logits_with_a_cache_equal_the_parallel_form(pieces):
    config = small_config(pattern="mm*", num_layers=3, mamba1=SETTINGS)
    model = small_model(config).eval()
    tokens = random_tokens(config, 3, 20)
    cache = models.Cache()
    logits = torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-11)
    assert {name: tuple(t.shape) for name, t in cache.layer(0).items()} == {
        "conv_x": (3, 48, 3),
        "state": (3, 48, 5),
    }


@pytest.mark.parametrize("name", ["raster+reverse", "column", "zigzag:1", "hilbert"])
def test_a_scan_order_is_a_permutation_around_the_raster_scan(name):
    scanned, raster = build(image_config(orders=[name])), build()
    raster.load_state_dict(scanned.state_dict())
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    order = scan_order(name, GRID)
    found = scanned(x, Context(scan=Scan.of_grid(GRID, "cpu")))
    expected = raster(x[:, order], Context())[:, inverse(order)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, raster(x, Context()), atol=1e-3)


def test_orders_are_cycled_over_layers_or_averaged_within_each():
    names = ["raster", "column", "raster+reverse", "column+reverse"]
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    context = Context(scan=Scan.of_grid(GRID, "cpu"))
    alone = [build(image_config(orders=[name]))(x, context) for name in names]
    for layer in (0, 1, 2):
        cycled = build(image_config(orders=names), layer)(x, context)
        torch.testing.assert_close(cycled, alone[layer], rtol=0, atol=1e-12)
    merged = build(image_config(orders=names, merge="sum"))(x, context)
    torch.testing.assert_close(merged, sum(alone) / 4, rtol=0, atol=1e-12)


def test_a_learned_token_stands_behind_each_line():
    config = image_config(orders=["column"], line_ends=True)
    mixer = build(config)
    plain = Mamba1(text_config(), 0).double()
    plain.load_state_dict({n: v for n, v in mixer.state_dict().items() if n != "pad_token"})
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    columns = x[:, scan_order("column", GRID)]
    ends = line_ends("column", GRID).tolist()
    places = [p for t in range(12) for p in ([t, 12] if t in ends else [t])]
    padded = torch.cat([columns, mixer.pad_token.expand(1, 1, -1)], 1)[:, places]
    y = plain(padded, Context())[:, [i for i, place in enumerate(places) if place < 12]]
    found = mixer(x, Context(scan=Scan.of_grid(GRID, "cpu")))
    torch.testing.assert_close(found, y[:, inverse(scan_order("column", GRID))], rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), mixer.pad_token)
    assert gradient.abs().max() > 0


def test_packed_images_are_scanned_each_on_its_own():
    mixer = build(image_config(orders=["column"]))
    sizes = torch.tensor([[[3, 4], [2, 2]], [[2, 5], [0, 0]]])
    ids = torch.tensor([[0] * 12 + [1] * 4, [0] * 10 + [2] * 6])
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    context = build_context(ids)
    packed = mixer(x, Context(cu_seqlens=context.cu_seqlens, scan=Scan.of_packed(sizes, ids)))
    for row, start, shape in [(0, 0, (3, 4)), (0, 12, (2, 2)), (1, 0, (2, 5))]:
        part = slice(start, start + math.prod(shape))
        alone = mixer(x[row : row + 1, part], Context(scan=Scan.of_grid(shape, "cpu")))
        torch.testing.assert_close(packed[row : row + 1, part], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tp", [2, 4])
def test_partial_sums_and_gradients_of_shards_add_up(tp):
    """The sharding table, and the sum inside the region in both directions."""
    mixer = build()
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 9, 24, dtype=torch.float64)
    names = ("z_proj.weight", "dt_up.weight", "a_log", "conv_x.bias")
    rows = ("dt_down.weight", "b_proj.weight", "c_proj.weight")

    def shard(rank, group):
        local = build()
        for name, value in parameters.items():
            set_parameter(local, name, value[window_of(mixer.sharding[name], value.shape, tp, rank)])
        local.shards = ThreadShards(group, rank)
        y = local(x, Context())
        sources = [x, *(local.get_parameter(name) for name in (*names, *rows))]
        return y.detach(), *torch.autograd.grad((y * weights).sum(), sources)

    assert mixer.sums_inside
    y = mixer(x, Context())
    sources = [x, *(mixer.get_parameter(name) for name in (*names, *rows))]
    dx, *expected = torch.autograd.grad((y * weights).sum(), sources)
    ys, dxs, *parts = zip(*on_ranks(tp, shard))
    torch.testing.assert_close(sum(ys), y.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(sum(dxs), dx, rtol=1e-10, atol=1e-11)
    for name, found, whole in zip((*names, *rows), parts, expected):
        torch.testing.assert_close(torch.cat(found, 1 if name in rows else 0), whole, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("images", [False, True])
def test_two_ranks_find_the_same(images, distributed):
    config = image_config(orders=["column"], line_ends=True) if images else text_config()
    check_cuts(config, distributed)


def test_the_recomputed_core_changes_nothing():
    config = image_config(orders=["raster", "column"], merge="sum")
    plain, again = gradients(config), gradients(config, recompute="selective")
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    kept = {policy: kept_shapes(config, policy) for policy in ("none", "selective")}
    inner = (4, 12, 48)
    # z and x ahead of the core; the input of out_proj is (2, 12, 48) behind the mean of both scans.
    assert kept["selective"].count(inner) == 2
    assert kept["none"].count(inner) > 2


def kept_shapes(config, recompute):
    """Shapes of what autograd keeps, parameters left out."""
    from triptych.parallel.recompute import apply_recompute

    pair = Pair(config)
    apply_recompute(pair, recompute)
    held = {p.untyped_storage().data_ptr() for p in pair.parameters()}
    kept = {}

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in held:
            kept[pointer] = tuple(tensor.shape)
        return tensor

    x = torch.randn(2, 12, 24, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = pair(x, Context(scan=Scan.of_grid(GRID, "cpu")))
    y.sum().backward()
    return list(kept.values())


@pytest.mark.parametrize(
    "scan",
    [{"orders": ["column"]}, {"orders": ["raster", "column"], "merge": "sum"},
     {"orders": ["column"], "line_ends": True}],
)  # fmt: skip
def test_flops_on_the_meta_device(scan):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mixer = Mamba1(image_config(**scan), 0)
        y = mixer(torch.empty(1, 12, 24), Context(scan=Scan.of_grid(GRID, "meta")))
    assert y.shape == (1, 12, 24)
    assert mixer.flops(12) == counter.get_total_flops()


def test_bf16_under_autocast():
    exact = build()
    mixer = build(dtype=torch.float32)
    x = torch.randn(2, 30, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, Context())
    assert y.dtype == torch.bfloat16
    expected = exact(x.double(), Context())
    assert (y.double() - expected).norm() < 2**-6 * expected.norm()


def test_decay_parameters_stay_in_fp32_and_go_to_float64():
    assert {p.dtype for p in build().parameters()} == {torch.float64}
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = Mamba1(small_config(), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mixer.x_proj.weight.dtype == torch.bfloat16
    assert {mixer.a_log.dtype, mixer.d.dtype, mixer.dt_bias.dtype} == {torch.float32}


def test_configurations_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"model\.mamba1\.expand=1\.3 times model\.hidden_size=24 is not whole"
    ):
        text_config(expand=1.3)
    with pytest.raises(ValueError, match=r"model\.mamba1\.dt_min=0\.2 is above model\.mamba1\.dt_max=0\.1"):
        text_config(dt_min=0.2)
