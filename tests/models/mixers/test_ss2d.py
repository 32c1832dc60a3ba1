"""SS2D against a loop over positions of the image in float64, its shards, and the VMamba models it makes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import ThreadShards, on_ranks, set_parameter, small_config, window_of
from tests.models.regions import Pair, check_cuts, context_of, gradients
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import init_table, initialize
from triptych.models.mixers import SS2D
from triptych.models.scan import Scan
from triptych.models.vision import VisionModel
from triptych.models.vision_config import VisionConfig
from triptych.parallel.recompute import apply_recompute

GRID = (3, 4)
SETTINGS = {"state_size": 3, "dt_rank": 2, "chunk_size": 8}


def image_config(grid=GRID, **settings) -> DiffusionConfig:
    return DiffusionConfig.model_validate(
        {
            "hidden_size": 24,
            "num_layers": 3,
            "pattern": ["ss2d+none"],
            "in_channels": 3,
            "input_size": [side * 2 for side in grid],
            "ss2d": SETTINGS | settings,
        }
    )


def build(dtype: torch.dtype = torch.float64, **settings) -> SS2D:
    mixer = Pair(image_config(**settings)).mixer
    return mixer.to(dtype)


def context(grid=GRID) -> Context:
    return Context(scan=Scan.of_grid(grid, "cpu"))


def by_hand(mixer: SS2D, x: torch.Tensor, grid=GRID) -> torch.Tensor:
    """Pixel by pixel: the paths across the image are lists of (row, column)."""
    (H, W), K, R = grid, 4, mixer.dt_weight.shape[2]
    N = mixer.a_log.shape[2]
    u = (x @ mixer.in_proj.weight.T).unflatten(1, grid)
    I = u.shape[-1]  # noqa: E741
    reach = mixer.conv.weight.shape[1] // 2
    padded = F.pad(u, (0, 0, reach, reach, reach, reach))
    u = sum(
        padded[:, i : i + H, j : j + W] * mixer.conv.weight[:, i, j]
        for i in range(2 * reach + 1)
        for j in range(2 * reach + 1)
    )
    u = u * torch.sigmoid(u)
    rows = [(i, j) for i in range(H) for j in range(W)]
    columns = [(i, j) for j in range(W) for i in range(H)]
    y = torch.zeros_like(u)
    for k, path in enumerate((rows, columns, rows[::-1], columns[::-1])):
        project = mixer.x_proj.weight.unflatten(0, (K, R + 2 * N))[k]
        state = u.new_zeros(u.shape[0], I, N)
        out = {}
        for i, j in path:
            token = u[:, i, j]
            low, b, c = (token @ project.T).split([R, N, N], -1)
            dt = torch.log1p(torch.exp(low @ mixer.dt_weight[:, k].T + mixer.dt_bias[:, k]))
            decay = torch.exp(-torch.exp(mixer.a_log[:, k]) * dt[:, :, None])
            state = decay * state + (dt * token)[:, :, None] * b[:, None, :]
            out[i, j] = (state * c[:, None, :]).sum(-1) + mixer.d[:, k] * token
        y = y + torch.stack([torch.stack([out[i, j] for j in range(W)], 1) for i in range(H)], 1)
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()
    normed = normed * mixer.norm.weight + mixer.norm.bias
    return normed.flatten(1, 2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize(
    ("grid", "settings"),
    [(GRID, {}), ((1, 5), {}), ((4, 2), {"conv_kernel": 1}), (GRID, {"state_size": 1, "conv_kernel": 5})],
)
def test_mixer_and_gradients_equal_a_loop_in_float64(grid, settings):
    mixer = build(**settings)
    x = torch.randn(2, grid[0] * grid[1], 24, dtype=torch.float64, requires_grad=True)
    found, expected = mixer(x, context(grid)), by_hand(mixer, x, grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(found)
    sources = dict(mixer.named_parameters()) | {"x": x}
    for name, ours, theirs in zip(
        sources,
        torch.autograd.grad((found * weights).sum(), sources.values()),
        torch.autograd.grad((expected * weights).sum(), sources.values()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("width", "depths", "expand", "count", "gflops"),
    [
        (96, (2, 2, 8, 2), 1.0, 30_249_064, 4.9),
        (96, (2, 2, 15, 2), 2.0, 50_147_752, 8.7),
        (128, (2, 2, 15, 2), 2.0, 88_557_800, 15.4),
    ],
)
def test_vmamba_has_the_published_parameters_and_flops(width, depths, expand, count, gflops):
    config = VisionConfig.model_validate(
        {
            "pattern": "S",
            "input_size": 224,
            "patch_size": 4,
            "stem": "conv",
            "position": "none",
            "ss2d": {"expand": expand},
            "stages": [{"depth": depth, "hidden_size": width << i} for i, depth in enumerate(depths)],
            "tasks": {"imagenet": {"kind": "classify", "num_classes": 1000}},
        }
    )
    with torch.device("meta"):
        model = VisionModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    blocks = sum(block.flops(config.length_at(block.layer, 56 * 56)) for block in model.blocks.values())
    rest = model.conv_stem.flops(56 * 56) + sum(
        step.flops(config.length_at(int(layer), 56 * 56)) for layer, step in model.downsamples.items()
    )
    # The paper counts multiply-adds of linears once, and those of scans and norms in its own way.
    assert (blocks + rest) / 2e9 == pytest.approx(gflops, rel=0.03)


def test_initial_values_are_the_published_ones():
    mixer = SS2D(image_config(state_size=4, dt_rank=None), 0).double()
    initialize(mixer, 0)
    assert init_table(mixer).keys() == dict(mixer.named_parameters()).keys()
    assert mixer.dt_weight.shape == (48, 4, 2)
    expected = torch.arange(1, 5, dtype=torch.float64).log().expand(48, 4, 4)
    torch.testing.assert_close(mixer.a_log.detach(), expected, rtol=0, atol=1e-15)
    assert torch.equal(mixer.d, torch.ones(48, 4, dtype=torch.float64))
    steps = F.softplus(mixer.dt_bias)
    assert 0.001 <= steps.min() < 0.003 and 0.03 < steps.max() <= 0.1
    assert 0.9 * 2**-0.5 < mixer.dt_weight.abs().max() <= 2**-0.5
    assert 0.9 / 3 < mixer.conv.weight.abs().max() <= 1 / 3


@pytest.mark.parametrize("tp", [2, 3])
def test_partial_sums_and_gradients_of_shards_add_up(tp):
    """The sharding table, and the sums inside the region in both directions."""
    mixer = build()
    x = torch.randn(2, 12, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 12, 24, dtype=torch.float64)
    names = [name for name, _ in mixer.named_parameters()]
    cuts = mixer.sharding | {f"norm.{name}": cut for name, cut in mixer.norm.sharding.items()}
    assert cuts.keys() == set(names)

    def shard(rank, group):
        local = build()
        for name in names:
            value = mixer.get_parameter(name).detach()
            set_parameter(local, name, value[window_of(cuts[name], value.shape, tp, rank)])
        local.shards = local.norm.shards = ThreadShards(group, rank)
        y = local(x, context())
        sources = [x, *(local.get_parameter(name) for name in names)]
        return y.detach(), *torch.autograd.grad((y * weights).sum(), sources)

    y = mixer(x, context())
    dx, *expected = torch.autograd.grad((y * weights).sum(), [x, *map(mixer.get_parameter, names)])
    ys, dxs, *parts = zip(*on_ranks(tp, shard))
    torch.testing.assert_close(sum(ys), y.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(sum(dxs), dx, rtol=1e-10, atol=1e-11)
    for name, found, whole in zip(names, parts, expected):
        joined = torch.cat(found, 1 if cuts[name].kind == "row" else 0)
        torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_find_the_same(distributed):
    check_cuts(image_config(), distributed)


def test_the_recomputed_core_changes_nothing():
    config = image_config()
    plain, again = gradients(config), gradients(config, recompute="selective")
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    inner = 2 * 12 * 48
    # The output of in_proj and the input of out_proj.
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


def test_flops_on_the_meta_device():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mixer = SS2D(image_config(), 0)
        y = mixer(torch.empty(1, 12, 24), Context(scan=Scan.of_grid(GRID, "meta")))
    assert y.shape == (1, 12, 24)
    assert mixer.flops(12) == counter.get_total_flops()


def test_bf16_under_autocast():
    exact, mixer = build(), build(torch.float32)
    x = torch.randn(2, 12, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, context())
    assert y.dtype == torch.bfloat16
    expected = exact(x.double(), context())
    assert (y.double() - expected).norm() < 2**-6 * expected.norm()


def test_packed_rows_and_routed_tokens_are_refused():
    mixer = build()
    sizes, ids = torch.tensor([[[2, 2], [2, 2]]]), torch.tensor([[0] * 4 + [1] * 4])
    with pytest.raises(ValueError, match=r"mixer ss2d.*packed rows cannot be given to it"):
        mixer(torch.zeros(1, 8, 24, dtype=torch.float64), Context(scan=Scan.of_packed(sizes, ids)))
    routed = Scan.of_grid(GRID, "cpu").route(torch.arange(6).unsqueeze(0))
    with pytest.raises(ValueError, match=r"mixer ss2d.*train\.tread"):
        mixer(torch.zeros(1, 6, 24, dtype=torch.float64), Context(scan=routed))


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match=r"model\.ss2d\.expand=1\.3 times model\.hidden_size=24"):
        image_config(expand=1.3)
    with pytest.raises(ValueError, match=r"model\.ss2d\.conv_kernel=4 has no middle"):
        image_config(conv_kernel=4)
    with pytest.raises(ValueError, match=r"model\.ss2d\.dt_min=0\.2 is above model\.ss2d\.dt_max=0\.1"):
        image_config(dt_min=0.2)
    with pytest.raises(ValueError, match=r"ss2d.*model\.input_size=\[6\] has none"):
        image_config(grid=(3,))
    with pytest.raises(ValueError, match=r"ss2d.*model\.family=lm has none"):
        small_config(pattern=["ss2d"])
