"""PoolFormer's pooling against a loop over neighbours, its shards, and one skeleton for all mixers."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.common import ThreadShards, on_ranks, small_config
from tests.models.regions import check_cuts
from triptych.models.context import Context
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import initialize
from triptych.models.mixers import Pool
from triptych.models.scan import Scan
from triptych.models.vision import VisionModel
from triptych.models.vision_config import VisionConfig

GRID = (3, 4)


def image_config(pattern="pool+none") -> DiffusionConfig:
    return DiffusionConfig.model_validate(
        {
            "hidden_size": 24,
            "num_layers": 3,
            "pattern": [pattern],
            "in_channels": 3,
            "input_size": [side * 2 for side in GRID],
        }
    )


def context(grid=GRID) -> Context:
    return Context(scan=Scan.of_grid(grid, "cpu"))


def by_hand(x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Token by token."""
    places = list(itertools.product(*map(range, grid)))
    means = []
    for place in places:
        near = [n for n, other in enumerate(places) if all(abs(a - b) <= 1 for a, b in zip(place, other))]
        means.append(x[:, near].mean(1))
    return torch.stack(means, 1) - x


@pytest.mark.parametrize("grid", [GRID, (1, 1), (2, 5), (6,), (2, 3, 4)])
def test_pooling_and_its_gradient_equal_a_loop(grid):
    mixer = Pool(image_config(), 0)
    x = torch.randn(2, math.prod(grid), 24, dtype=torch.float64, requires_grad=True)
    found, expected = mixer(x, context(grid)), by_hand(x, grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_a_constant_image_is_left_at_zero():
    y = Pool(image_config(), 0)(torch.full((1, 12, 5), 3.0), context())
    torch.testing.assert_close(y, torch.zeros_like(y))


@pytest.mark.parametrize("tp", [2, 3])
def test_shares_of_the_ranks_add_up(tp):
    x = torch.randn(2, 12, 24, dtype=torch.float64)

    def shard(rank, group):
        local = Pool(image_config(), 0)
        local.shards = ThreadShards(group, rank)
        return local(x, context())

    expected = Pool(image_config(), 0)(x, context())
    torch.testing.assert_close(sum(on_ranks(tp, shard)), expected, rtol=1e-14, atol=1e-14)


def test_two_ranks_find_the_same(distributed):
    """Beside a feed-forward, so that there is something to cut."""
    check_cuts(image_config("pool+gelu"), distributed)


def test_there_is_nothing_to_learn_and_nothing_to_multiply():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mixer = Pool(image_config(), 0)
        y = mixer(torch.empty(1, 12, 24), Context(scan=Scan.of_grid(GRID, "meta")))
    assert y.shape == (1, 12, 24)
    assert not list(mixer.parameters())
    assert mixer.flops(12) == counter.get_total_flops() == 0


def test_packed_rows_are_refused():
    sizes, ids = torch.tensor([[[2, 2], [2, 2]]]), torch.tensor([[0] * 4 + [1] * 4])
    with pytest.raises(ValueError, match=r"mixer pool.*packed rows cannot be given to it"):
        Pool(image_config(), 0)(torch.zeros(1, 8, 24), Context(scan=Scan.of_packed(sizes, ids)))


def test_a_language_model_has_no_grid():
    with pytest.raises(ValueError, match=r"pool, which looks at neighbours.*model\.family=lm has none"):
        small_config(pattern=["pool"])


def skeleton(mixer: str) -> VisionModel:
    """A hierarchical backbone of which the mixer alone changes."""
    config = VisionConfig.model_validate(
        {
            "pattern": [mixer],
            "input_size": 32,
            "patch_size": 4,
            "stem": "conv",
            "position": "none",
            "stages": [{"depth": 2, "hidden_size": 16}, {"depth": 1, "hidden_size": 32}],
            "attention": {"num_heads": 2, "rope_theta": None},
            "mamba2": {"head_dim": 8, "state_size": 4},
            "wkv": {"shift": "none"},
            "tasks": {"digits": {"kind": "classify", "num_classes": 10}},
        }
    )
    model = VisionModel(config).double()
    initialize(model, 0)
    return model


def test_only_the_mixer_changes():
    """One skeleton takes every mixer; whatever is no mixer is the same, to the values."""
    outside = {}
    for mixer in ("pool", "attention", "mamba1", "mamba2", "ss2d", "mlstm", "wkv"):
        model = skeleton(mixer)
        outside[mixer] = {n: p for n, p in model.named_parameters() if ".mixer." not in n}
        (logits,) = model(
            torch.randn(2, 3, 32, 32, dtype=torch.float64), tasks=torch.zeros(2, dtype=torch.int64)
        )
        assert logits.shape == (2, 10) and logits.isfinite().all()
        loss = logits.square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
    for parameters in outside.values():
        assert parameters.keys() == outside["pool"].keys()
        assert all(torch.equal(value, outside["pool"][name]) for name, value in parameters.items())
