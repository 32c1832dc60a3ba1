"""DiMSUM's mixer against its formula: tokens and coefficients put in order by hand, attention in loops."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import ThreadShards, on_ranks, set_parameter, small_config, window_of
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import init_table, initialize
from triptych.models.mixers import Dimsum, Mamba1
from triptych.models.scan import Scan
from triptych.models.scan_order import scan_order

GRID = (4, 8)
ORDERS = ["raster", "raster+reverse", "column", "column+reverse"]


def config_of(**overrides) -> DiffusionConfig:
    values = {
        "hidden_size": 24,
        "num_layers": 4,
        "pattern": "D",
        "in_channels": 3,
        "input_size": [8, 16],
        "conditioning": {"kind": "none"},
        "attention": {"num_heads": 4},
        "mamba1": {"state_size": 3, "chunk_size": 4},
        "scan": {"orders": ORDERS},
    }
    return DiffusionConfig.model_validate(values | overrides)


def build(config: DiffusionConfig | None = None, layer: int = 0) -> Dimsum:
    """Initialised, then moved a little, so that biases and norms are not what they begin with."""
    mixer = Dimsum(config or config_of(), layer).double()
    initialize(mixer, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return mixer


def tokens() -> torch.Tensor:
    return torch.randn(2, 32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def context() -> Context:
    return Context(scan=Scan.of_grid(GRID, "cpu"))


def haar_matrix(levels: int, size: int) -> list[torch.Tensor]:
    """Of one direction: the rows of every sequence of low and high passes, first pass first."""
    bands = [torch.eye(size, dtype=torch.float64)]
    for _ in range(levels):
        bands = [(band[0::2] + sign * band[1::2]) / 2**0.5 for band in bands for sign in (1, -1)]
    return bands


def wavelet_matrix(levels: int) -> torch.Tensor:
    """(T, T): the subbands one after the other, by the passes of the first level, then of the second."""
    downs, acrosses = (haar_matrix(levels, size) for size in GRID)
    rows = []
    for band in range(4**levels):
        # Digits of the band: (down, across) of the first level, and so on.
        digits = [(band >> 2 * (levels - 1 - level)) & 3 for level in range(levels)]
        down = functools.reduce(lambda number, digit: 2 * number + (digit >> 1), digits, 0)
        across = functools.reduce(lambda number, digit: 2 * number + (digit & 1), digits, 0)
        rows.append(torch.kron(downs[down], acrosses[across]))
    return torch.cat(rows)


def scanned(mixer: Mamba1, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x through a plain Mamba-1 with the mixer's parameters, in that order."""
    plain = Mamba1(config_of().model_copy(update={"hidden_size": 12, "scan": None}), 0)
    y = torch.empty_like(x)
    parameters = dict(mixer.named_parameters())
    y[:, order] = torch.func.functional_call(plain, parameters, (x[:, order], Context()))
    return y


def attended(q, k, v, head_dim: int) -> torch.Tensor:
    """A loop over rows, heads and queries."""
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))
    out = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                weights = torch.softmax(k[b, :, g] @ q[b, t, h] / head_dim**0.5, 0)
                out.append(weights @ v[b, :, g])
    return torch.stack(out).view(*q.shape[:2], -1)


def by_hand(mixer: Dimsum, x: torch.Tensor, name: str, levels: int = 2) -> torch.Tensor:
    u, v = x[..., :12], x[..., 12:]
    u = u + scanned(mixer.spatial, u, scan_order(name, GRID))
    matrix = wavelet_matrix(levels)
    shape = (GRID[0] >> levels, GRID[1] >> levels)
    within = scan_order(name, shape)
    order = torch.cat([within + band * within.numel() for band in range(4**levels)])
    v = v + matrix.T @ scanned(mixer.wavelet, matrix @ v, order)
    first, second = mixer.fusion.spatial, mixer.fusion.wavelet
    (q_u, k_u, v_u), (q_v, k_v, v_v) = first.project(u), second.project(v)
    D = first.head_dim
    found = torch.cat([attended(q_u, k_v, v_v, D), attended(q_v, k_u, v_u, D)], -1)
    bias = 0 if first.o_proj.bias is None else first.o_proj.bias
    return found @ torch.cat([first.o_proj.weight, second.o_proj.weight], 1).T + bias


@pytest.mark.parametrize(("layer", "levels"), [(0, 2), (1, 2), (2, 1), (3, 2)])
def test_mixer_equals_its_formula_in_the_direction_of_its_layer(layer, levels):
    config = config_of(
        dimsum={"wavelet_levels": levels}, attention={"num_heads": 4, "num_kv_heads": 2, "bias": True}
    )
    mixer, x = build(config, layer), tokens().requires_grad_()
    found, expected = mixer(x, context()), by_hand(mixer, x, ORDERS[layer], levels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(found)
    sources = [x, *mixer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), sources),
        torch.autograd.grad((expected * weights).sum(), sources),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_wavelet_branch_has_gradients_and_its_scan_spans_the_subbands():
    """A change of the mean of one block, which is in the coarsest subband, is felt in all blocks that it
    precedes; a change of the finest coefficient of the last block in that block alone."""
    wavelet = build().wavelet
    x = tokens()[:, :, :12]
    base = wavelet(x, context())
    matrix = wavelet_matrix(2)

    def moved(coefficient: int) -> torch.Tensor:
        change = torch.zeros(32, dtype=torch.float64)
        change[coefficient] = 1.0
        y = wavelet(x + (matrix.T @ change)[:, None], context())
        return (matrix @ (y - base)).abs().amax((0, 2))

    assert (moved(0) > 1e-12).all()
    assert (moved(31)[:31] < 1e-13).all() and moved(31)[31] > 1e-9
    gradients = torch.autograd.grad(base.square().sum(), list(wavelet.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_partial_sums_of_each_regions_shards_add_up(num_kv_heads):
    attention = {"num_heads": 4, "num_kv_heads": num_kv_heads, "bias": True, "qk_norm": True}
    config = config_of(attention=attention)
    mixer = build(config)
    regions = {name: part for name, part in mixer.named_children() if part.tp_region}
    assert list(regions) == ["spatial", "wavelet", "fusion"] and not hasattr(mixer, "tp_region")
    x = tokens()

    def shard(rank, group):
        local = build(config)
        for prefix, module in mixer.named_modules():
            for name, cut in getattr(module, "sharding", {}).items():
                key = f"{prefix}.{name}".lstrip(".")
                value = mixer.get_parameter(key).detach()
                value = value[window_of(cut, value.shape, 2, rank)]
                set_parameter(local, key, value * 0 if cut.kind == "row_bias" and rank else value)
        shards = ThreadShards(group, rank)
        for module in local.modules():
            if getattr(module, "sums_inside", False):
                module.shards = shards
        for name in regions:
            part = getattr(local, name)
            part.forward = functools.partial(summed, part.forward, shards)
        with torch.no_grad():
            return local(x, context())

    def summed(forward, shards, *args):
        return shards.sum(forward(*args))

    whole = mixer(x, context()).detach()
    for part in on_ranks(2, shard):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-11)


def test_flops_are_those_pytorch_counts():
    config = config_of(scan={"orders": ["raster", "column"], "merge": "sum", "line_ends": True})
    mixer = Dimsum(config, 0)
    initialize(mixer, 0)
    with FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, 32, 24), context())
    assert mixer.flops(32) == counter.get_total_flops()


def test_line_ends_are_in_the_spatial_scan_alone():
    mixer = build(config_of(scan={"orders": ["raster"], "line_ends": True}))
    names = [name for name, _ in mixer.named_parameters()]
    assert "spatial.pad_token" in names and "wavelet.pad_token" not in names
    y = mixer(tokens(), context())
    (gradient,) = torch.autograd.grad(y.square().sum(), mixer.spatial.pad_token)
    assert gradient.abs().max() > 0


def test_the_halves_of_the_output_projection_are_drawn_as_one():
    table = init_table(build(config_of(init="xavier", attention={"num_heads": 4, "bias": True})))
    first, second = (table[f"fusion.{half}.o_proj.weight"] for half in ("spatial", "wavelet"))
    assert first == second and (first.fan_out, first.fan_in) == (24, 24)
    assert "fusion.spatial.o_proj.bias" in table and "fusion.wavelet.o_proj.bias" not in table


def test_dropout_needs_keys_and_follows_them():
    mixer = build(config_of(attention={"num_heads": 4, "dropout": 0.3})).train()
    x = tokens()
    keyed = Context(scan=Scan.of_grid(GRID, "cpu"), sample_keys=torch.tensor([5, 6]))
    assert torch.equal(mixer(x, keyed), mixer(x, keyed))
    assert not torch.allclose(mixer(x, keyed), mixer.eval()(x, keyed))


def test_on_the_meta_device_it_has_the_same_parameters():
    with torch.device("meta"):
        mixer = Dimsum(config_of(), 0)
        y = mixer(torch.empty(2, 32, 24), Context(scan=Scan.of_grid(GRID, "meta")))
    assert y.shape == (2, 32, 24)
    assert {n: p.shape for n, p in mixer.named_parameters()} == {
        n: p.shape for n, p in build().named_parameters()
    }


def test_what_it_cannot_transform_is_refused():
    mixer, x = build(), tokens()
    routed = Scan.of_grid(GRID, "cpu").route(torch.arange(16).expand(2, -1))
    with pytest.raises(ValueError, match=r"needs every token of the grid, but train\.tread leaves 16 of 32"):
        mixer(x[:, :16], Context(scan=routed))
    assert mixer.tread_refusal == "its wavelet branch needs every token of the grid"
    packed = Scan.of_packed(torch.tensor([[[4, 8]], [[4, 8]]]), torch.zeros(2, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="packed rows cannot be given to it"):
        mixer(x, Context(scan=packed))
    with pytest.raises(ValueError, match=r"model\.family=lm has none; use family: diffusion"):
        small_config(pattern=["dimsum"])
    with pytest.raises(ValueError, match=r"model\.input_size=\[16\] has none"):
        config_of(input_size=[16])
    with pytest.raises(ValueError, match=r"wavelet_levels=3 needs a grid that 8 divides.*input_size\[0\]=8"):
        config_of(dimsum={"wavelet_levels": 3})
    with pytest.raises(ValueError, match=r"model\.attention\.num_kv_heads=1 is odd"):
        config_of(attention={"num_heads": 4, "num_kv_heads": 1})
    with pytest.raises(ValueError, match=r"model\.hidden_size=27 is odd"):
        config_of(hidden_size=27, position="none", attention={"num_heads": 3})
    with pytest.raises(ValueError, match=r"model\.attention\.num_heads=3 is odd"):
        config_of(attention={"num_heads": 3})
