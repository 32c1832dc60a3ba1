"""Patches to tokens and back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.denoisers import build_denoiser, denoiser_config
from tests.models.plain_dit import position_table
from triptych import models
from triptych.models.context import Context
from triptych.models.patches import LocalConv, PatchEmbedding, patchify, unpatchify

SPACES = [((6,), 2), ((6, 4), 2), ((9, 3), 3), ((2, 4, 6), 2), ((4, 4), 1), ((4, 4), 4)]


@pytest.mark.parametrize(("space", "patch"), SPACES)
def test_tokens_are_patches_in_raster_order(space: tuple[int, ...], patch: int) -> None:
    """Value for value: token n holds, channel by channel, the patch at its place in raster order."""
    x = torch.arange(2 * 3 * math.prod(space), dtype=torch.float64).reshape(2, 3, *space)
    tokens = patchify(x, patch)
    grid = tuple(size // patch for size in space)
    assert tokens.shape == (2, math.prod(grid), 3 * patch ** len(space))
    for number, place in enumerate(itertools.product(*(range(size) for size in grid))):
        box = tuple(slice(patch * at, patch * (at + 1)) for at in place)
        for channel in range(3):
            values = tokens[1, number].reshape(3, -1)[channel]
            assert torch.equal(values, x[(1, channel, *box)].reshape(-1)), (place, channel)


@pytest.mark.parametrize(("space", "patch"), SPACES)
def test_unpatchify_is_the_inverse(space: tuple[int, ...], patch: int) -> None:
    x = torch.randn(2, 3, *space)
    grid = tuple(size // patch for size in space)
    assert torch.equal(unpatchify(patchify(x, patch), grid, patch), x)
    tokens = torch.randn(2, math.prod(grid), 5 * patch ** len(space))
    assert torch.equal(patchify(unpatchify(tokens, grid, patch), patch), tokens)


def test_a_size_that_the_patch_does_not_divide_is_refused() -> None:
    words = r"size \[4, 6\] is not divisible by model.patch_size=4 along axis 1; resize .*divides 6"
    with pytest.raises(ValueError, match=words):
        patchify(torch.zeros(1, 1, 4, 6), 4)


@pytest.mark.parametrize("space", [(12,), (8, 4), (4, 4, 6)])
def test_the_embedding_is_a_convolution(space: tuple[int, ...]) -> None:
    """With stride and kernel of the patch, in 1, 2 and 3 dimensions."""
    config = denoiser_config(input_size=list(space), position="none")
    embedding = build_denoiser(config).patch_embedding
    x = torch.randn(2, 3, *space, dtype=torch.float64)
    axes = len(space)
    convolve = getattr(torch.nn.functional, f"conv{axes}d")
    kernel = embedding.proj.weight.reshape(24, 3, *(2,) * axes)
    expected = convolve(x, kernel, embedding.proj.bias, stride=2).flatten(2).transpose(1, 2)
    positions = torch.zeros(1, 1, axes, dtype=torch.int64)
    found = embedding(patchify(x, 2), config.grid, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_learned_positions_are_added_and_belong_to_one_size() -> None:
    config = denoiser_config(position="learned")
    embedding = build_denoiser(config).patch_embedding
    assert embedding.positions.shape == (8, 24)
    tokens = torch.randn(2, 8, 12, dtype=torch.float64)
    found = embedding(tokens, (4, 2), torch.zeros(1, 8, 2))
    expected = tokens @ embedding.proj.weight.T + embedding.proj.bias + embedding.positions
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"learned knows 8 places and the input has the grid \(2, 2\)"):
        embedding(tokens[:, :4], (2, 2), torch.zeros(1, 4, 2))


def test_the_table_of_sines_is_each_modules_own() -> None:
    """`describe` runs models on fake tensors; what it leaves behind must not reach a model that computes."""
    config = denoiser_config()
    tokens = torch.randn(1, 8, 12)
    with FakeTensorMode(allow_non_fake_inputs=True):
        models.build(config).patch_embedding(torch.zeros(1, 8, 12), (4, 2), torch.zeros(1, 8, 2))
    embedding = build_denoiser(config, dtype=torch.float32).patch_embedding
    twice = [embedding(tokens, (4, 2), torch.zeros(1, 8, 2)) for _ in range(2)]
    expected = tokens @ embedding.proj.weight.T + embedding.proj.bias + position_table((4, 2), 24).float()
    assert torch.equal(*twice)
    torch.testing.assert_close(twice[0], expected, rtol=0, atol=1e-6)


def test_tokens_stay_in_the_parameters_dtype_under_autocast() -> None:
    config = denoiser_config()
    embedding = build_denoiser(config, dtype=torch.float32).patch_embedding
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding(torch.randn(2, 8, 12), (4, 2), torch.zeros(1, 8, 2))
    assert found.dtype == torch.float32


def test_initial_values_of_the_two_ends() -> None:
    config = denoiser_config(position="learned", local_convs=True, hidden_size=48)
    model = build_denoiser(config, disturb=0.0)
    weight = model.patch_embedding.proj.weight.detach()
    bound = math.sqrt(6 / (12 + 48))
    assert 0.8 * bound < float(weight.abs().max()) <= bound
    assert torch.count_nonzero(model.patch_embedding.proj.bias) == 0
    assert 0.8 * 0.02 < float(model.patch_embedding.positions.detach().std()) < 1.2 * 0.02
    for name in ("proj.weight", "proj.bias", "modulation.proj.weight", "modulation.proj.bias"):
        assert torch.count_nonzero(model.head.get_parameter(name)) == 0
    assert float(model.first_conv.weight.detach().abs().max()) <= math.sqrt(6 / 18)


def test_the_head_is_norm_modulation_linear() -> None:
    config = denoiser_config(out_channels=5)
    head = build_denoiser(config).head
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    told = torch.randn(2, 1, 24, dtype=torch.float64)
    shift, scale = (told @ head.modulation.proj.weight.T + head.modulation.proj.bias).chunk(2, dim=-1)
    inner = torch.nn.functional.layer_norm(x, (24,), eps=1e-6) * (1 + scale) + shift
    expected = inner @ head.proj.weight.T + head.proj.bias
    found = head(x, Context(conditioning=told))
    assert found.shape == (2, 8, 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["patch_embedding", "head", "first_conv"])
def test_flops_are_counted_as_torch_counts_them(part: str) -> None:
    config = denoiser_config(local_convs=True)
    model = build_denoiser(config)
    module = getattr(model, part)
    x = torch.randn(1, 8, 24, dtype=torch.float64)
    arguments = {
        "patch_embedding": (torch.randn(1, 8, 12, dtype=torch.float64), (4, 2), torch.zeros(1, 8, 2)),
        "head": (x, Context(conditioning=x[:, :1])),
        "first_conv": (x, (4, 2)),
    }
    with FlopCounterMode(display=False) as counter:
        module(*arguments[part])
    assert module.flops(8) == counter.get_total_flops()


def test_modules_say_how_they_stand_in_the_stream() -> None:
    """What parallel/tensor.py reads."""
    config = denoiser_config(local_convs=True)
    model = models.build(config)
    marks = {name: module.sequence for name, module in model.named_modules() if hasattr(module, "sequence")}
    assert marks == {
        "patch_embedding": "enter",
        "first_conv": "whole",
        "leave": "whole",
        "comeback": "whole",
        "last_conv": "whole",
        "head": "leave",
    }
    assert isinstance(model.first_conv, LocalConv) and isinstance(model.patch_embedding, PatchEmbedding)
