"""TREAD: the kept tokens go through a range of blocks, the others around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models.denoisers import (
    build_denoiser,
    denoiser_config,
    image_batch,
    largest_difference,
    packed_batch,
)
from triptych.models.context import Context
from triptych.models.diffusion import DiffusionModel
from triptych.models.patches import patchify, unpatchify
from triptych.models.positions import Rope, axial_rope, grid_positions
from triptych.models.routing import Leave, Return, take
from triptych.models.scan_order import scan_order

TOLERANCE = 1e-12
KEPT = torch.tensor([[0, 1, 3, 6, 7], [1, 2, 4, 5, 7]])
ROUTED = (1, 3)
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "mamba1": {"pattern": ["mamba1+none"]},
    "mamba2": {"pattern": ["mamba2+none"], "mamba2": {"state_size": 4, "head_dim": 6, "chunk_size": 8}},
    "mlstm": {"pattern": ["mlstm+none"], "mlstm": {"chunk_size": 8}},
    "wkv": {"pattern": ["wkv+channel_mix"], "wkv": {"shift": "none"}, "ffn": {"kind": "channel_mix"}},
    "hybrid": {
        "pattern": ["mamba2", "attention"],
        "mamba2": {"state_size": 4, "head_dim": 6, "chunk_size": 8},
    },
}
ORDERS = ("zigzag:3", "column+reverse", "zigzag:1")


def routed(
    model: DiffusionModel, batch: dict[str, Any], kept: Any = KEPT, which: Any = ROUTED
) -> torch.Tensor:
    keywords = {name: value for name, value in batch.items() if name != "x"}
    return model(batch["x"], kept=kept, routed=which, **keywords)


def plain(model: DiffusionModel, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch)


def by_hand(
    model: DiffusionModel, batch: dict[str, Any], kept: torch.Tensor, which: tuple[int, int]
) -> torch.Tensor:
    """Gather, blocks, scatter, image by image. A scan mixer gets its tokens sorted by its own order and no
    Scan:
    the kept ones in the order in which the whole image would be visited."""
    config = model.config
    outputs = []
    for row in range(batch["x"].shape[0]):
        told = model.time_embedding(batch["times"][row].view(1, 1))
        told = told + model.label_embedding(batch["labels"][row].view(1, 1))
        acts = F.silu(told)
        x = model.patch_embedding(patchify(batch["x"][row : row + 1], 2), config.grid, torch.zeros(1, 1, 2))
        everything = list(range(config.num_tokens))
        for layer, block in enumerate(model.blocks.values()):
            here = kept[row].tolist() if which[0] <= layer < which[1] else everything
            (name,) = config.scan.orders_of(layer)
            if config.layer_specs()[layer].mixer in ("attention", "wkv"):
                visit = list(here)
            else:
                visit = [token for token in scan_order(name, config.grid).tolist() if token in here]
            orders, block.mixer.orders = getattr(block.mixer, "orders", None), ()
            y = block(x[:, visit], Context(conditioning=acts))
            block.mixer.orders = orders
            x = x.index_copy(1, torch.tensor(visit), y)
        outputs.append(unpatchify(model.head(x, Context(conditioning=acts)), config.grid, 2))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", MIXERS)
def test_routing_is_gather_blocks_scatter(name: str) -> None:
    config = denoiser_config(num_layers=4, scan={"orders": ORDERS, "merge": "cycle"}, **MIXERS[name])
    model = build_denoiser(config)
    batch = image_batch(config)
    found = routed(model, batch)
    assert largest_difference(found, by_hand(model, batch, KEPT, ROUTED)) < TOLERANCE
    everything = torch.arange(8).expand(2, -1)
    assert largest_difference(plain(model, batch), by_hand(model, batch, everything, ROUTED)) < TOLERANCE
    assert largest_difference(found, plain(model, batch)) > 1e-3


@pytest.mark.parametrize("which", [(0, 1), (0, 4), (1, 4), (3, 4)])
def test_any_range_may_be_skipped(which: tuple[int, int]) -> None:
    config = denoiser_config(num_layers=4)
    model = build_denoiser(config)
    batch = image_batch(config)
    assert (
        largest_difference(routed(model, batch, which=which), by_hand(model, batch, KEPT, which)) < TOLERANCE
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"position": "rope", "attention": {"num_heads": 2}},
        {
            "pattern": ["mamba1+none"],
            "scan": {"orders": ["raster", "column"], "merge": "cycle", "line_ends": True},
        },
        {"pattern": ["wkv+channel_mix"], "ffn": {"kind": "channel_mix"}, "long_skips": True},
        {"long_skips": True, "local_convs": True},
        {"shared_block_every": 2},
    ],
)
def test_keeping_every_token_is_no_routing(overrides: dict[str, Any]) -> None:
    config = denoiser_config(num_layers=4, **overrides)
    model = build_denoiser(config)
    batch = image_batch(config)
    found = routed(model, batch, kept=torch.arange(8).expand(2, -1))
    assert largest_difference(found, plain(model, batch)) < TOLERANCE


def test_kept_tokens_keep_their_rotary_positions() -> None:
    """Attention among the kept with the positions of the whole grid, against scores written out."""
    config = denoiser_config(
        num_layers=1, position="rope", attention={"num_heads": 2}, pattern=["attention+none"]
    )
    model = build_denoiser(config)
    batch = image_batch(config)
    seen: dict[str, torch.Tensor] = {}
    mixer = model.blocks["0"].mixer
    mixer.register_forward_hook(lambda mixer, args, y: seen.update(x=args[0], y=y))
    routed(model, batch, which=(0, 1))
    assert seen["x"].shape == (2, 5, 24)
    rope: Rope = axial_rope(12, 10000.0, (4, 2), (4, 2), "none", torch.device("cpu"))
    places = grid_positions((4, 2), torch.device("cpu"))[0].double()
    for row in range(2):
        heads = []
        x, at = seen["x"][row], places[KEPT[row]]
        for head in range(2):
            q, k, v = (
                (x @ p.weight.T + p.bias)[:, 12 * head : 12 * head + 12]
                for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
            )
            turned = [
                torch.cat(
                    [rotated(t[:, 6 * a : 6 * a + 6], at[:, a], rope.frequencies[a]) for a in (0, 1)], -1
                )
                for t in (q, k)
            ]
            heads.append((turned[0] @ turned[1].T / 12**0.5).softmax(-1) @ v)
        y = torch.cat(heads, -1) @ mixer.o_proj.weight.T + mixer.o_proj.bias
        assert largest_difference(seen["y"][row], y) < TOLERANCE


def rotated(x: torch.Tensor, at: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    real, imaginary = x.chunk(2, dim=-1)
    z = torch.complex(real, imaginary) * torch.polar(
        torch.ones(1, dtype=torch.float64), at[:, None] * frequencies
    )
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("which", [(1, 2), (0, 3), (2, 5), (1, 4), (3, 5)])
def test_long_skips_around_and_into_the_range(which: tuple[int, int]) -> None:
    """A skip that enters the range brings its kept tokens; one that leaves it has the others as they were."""
    config = denoiser_config(num_layers=5, long_skips=True)
    model = build_denoiser(config)
    batch = image_batch(config, rows=1)
    kept = KEPT[:1]
    acts = F.silu(
        model.time_embedding(batch["times"][:, None]) + model.label_embedding(batch["labels"][:, None])
    )
    x = model.patch_embedding(patchify(batch["x"], 2), config.grid, torch.zeros(1, 1, 2))
    context, outputs = Context(conditioning=acts), {}
    for layer, block in enumerate(model.blocks.values()):
        here = kept[0] if which[0] <= layer < which[1] else torch.arange(8)
        source = config.skips_from(layer)
        part = x[:, here]
        if block.skip is not None:
            part = block.skip.proj(torch.cat([part, outputs[source][:, here]], dim=-1))
        part = without_skip(block, part, context)
        x = x.index_copy(1, here, part)
        # All tokens as they stand behind this block: those that went around are what they were.
        outputs[layer] = x
    expected = unpatchify(model.head(x, context), config.grid, 2)
    assert largest_difference(routed(model, batch, kept, which), expected) < TOLERANCE


def without_skip(block: Any, x: torch.Tensor, context: Context) -> torch.Tensor:
    skip, block.skip = block.skip, None
    y = block(x, context)
    block.skip = skip
    return y


def test_packed_rows_are_routed_image_by_image() -> None:
    """The kept tokens of one image see each other and none of another's."""
    config = denoiser_config(num_layers=3, position="rope", attention={"num_heads": 2})
    model = build_denoiser(config)
    batch = packed_batch(config, [[(2, 2), (1, 3)], [(3, 2)]], length=8, places=2)
    kept = torch.tensor([[0, 2, 4, 6, 7], [1, 2, 5, 6, 7]])
    found = routed(model, batch, kept)
    for row, image, start, grid in ((0, 0, 0, (2, 2)), (0, 1, 4, (1, 3)), (1, 0, 0, (3, 2))):
        count = grid[0] * grid[1]
        mine = [int(n) - start for n in kept[row] if start <= n < start + count]
        one = {
            "x": unpatchify(batch["x"][row : row + 1, start : start + count], grid, 2),
            "times": batch["times"][row, image : image + 1],
            "labels": batch["labels"][row, image : image + 1],
        }
        expected = patchify(routed(model, one, torch.tensor([mine])), 2)
        assert largest_difference(found[row : row + 1, start : start + count], expected) < TOLERANCE


def test_gradients_reach_all_tokens() -> None:
    config = denoiser_config(num_layers=4)
    model = build_denoiser(config)
    batch = image_batch(config)
    batch["x"].requires_grad_()
    output = routed(model, batch)
    (gradient,) = torch.autograd.grad(output.square().sum(), batch["x"])
    assert bool((patchify(gradient, 2).abs().amax(-1) > 0).all())


def test_leave_and_return() -> None:
    x, kept = torch.randn(2, 8, 3), KEPT
    inside = Leave()(x, kept)
    assert torch.equal(inside[1], x[1, [1, 2, 4, 5, 7]])
    back = Return()(inside + 1, x, kept)
    for row in range(2):
        for token in range(8):
            assert torch.equal(back[row, token], x[row, token] + float(token in KEPT[row].tolist()))
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(take(ids, kept), kept), "one row for all is taken for each"


def test_dimsum_needs_the_whole_grid() -> None:
    config = denoiser_config(
        input_size=[8, 8],
        num_layers=3,
        pattern=["dimsum+none", "attention"],
        attention={"num_heads": 2},
        dimsum={"wavelet_levels": 2},
    )
    model = build_denoiser(config)
    batch = image_batch(config)
    kept = torch.arange(0, 16, 2).expand(2, -1)
    assert routed(model, batch, kept, (1, 2)).shape == (2, 3, 8, 8), "a range without it is fine"
    with pytest.raises(
        ValueError, match=r"dimsum.*needs every token of the grid, but train.tread leaves 8 of 16"
    ):
        routed(model, batch, kept, (1, 3))
