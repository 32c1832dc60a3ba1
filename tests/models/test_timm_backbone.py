"""timm's backbones: sizes to the unit, timm's own outputs, initial values of the seed alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from triptych.models import initialize
from triptych.models.init import Constant, Normal, Uniform
from triptych.models.timm_backbone import TimmBackbone
from triptych.models.timm_init import TruncatedNormal, Values, recorded
from triptych.models.vision_config import VisionConfig

CLASSIFY = {"objects": {"kind": "classify", "num_classes": 1000}}
DENSE = {**CLASSIFY, "parts": {"kind": "segment", "num_classes": 7}}
SIZES = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "poolformer_s12": 11_915_176,
    "poolformer_s24": 21_388_968,
    "poolformer_s36": 30_862_760,
    "vit_base_patch16_224": 86_567_656,
}
pytestmark = pytest.mark.usefixtures("timm")


def config_of(name: str, size: int = 224, tasks: Any = None, channels: int = 3) -> VisionConfig:
    return VisionConfig(timm=name, input_size=size, in_channels=channels, tasks=tasks or CLASSIFY)


def backbone(config: VisionConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> TimmBackbone:
    model = TimmBackbone(config).to(dtype)
    initialize(model, seed)
    return model


@pytest.mark.parametrize("name", SIZES)
def test_parameters_with_a_head_of_1000_classes(name: str) -> None:
    config = config_of(name)
    with torch.device("meta"):
        model = TimmBackbone(config)
    head = 1000 * (config.stage_configs[-1].hidden_size + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) + head == SIZES[name]


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("swin_tiny_patch4_window7_224", 64, 3),
        ("convnext_atto", 64, 1),
        ("poolformer_s12", 64, 3),
        ("vit_tiny_patch16_224", 48, 3),
        ("mixer_s32_224", 224, 3),
    ],
)
def test_outputs_are_timms_own(name: str, size: int, channels: int, timm: Any) -> None:
    """The same values in timm's model with its classifier: our vector in front through that classifier."""
    ours = backbone(config_of(name, size, DENSE, channels))
    sized = {} if name.startswith(("convnext", "poolformer")) else {"img_size": size}
    theirs = timm.create_model(name, num_classes=5, in_chans=channels, **sized).double().eval()
    held = {key.removeprefix("model."): value for key, value in ours.state_dict().items()}
    missing = theirs.load_state_dict(held, strict=False).missing_keys
    classifier = theirs.get_classifier()
    assert {key.rsplit(".", 1)[1] for key in missing} == {"weight", "bias"} and len(missing) == 2
    x = torch.randn(2, channels, size, size, dtype=torch.float64)
    features, *earlier = ours(x)
    torch.testing.assert_close(classifier(features[:, 0]), theirs(x), rtol=1e-9, atol=1e-12)
    cells = [math.prod(ours.grid) << 2 * more for more in range(len(earlier), -1, -1)]
    assert [tokens.shape[1] for tokens in (*earlier, features[:, 1:])] == cells
    # Without dense tasks the vector is alone, and the same.
    alone = backbone(config_of(name, size, CLASSIFY, channels))(x)
    assert len(alone) == 1 and torch.equal(alone[0], features[:, :1])
    # In training too: nothing is dropped.
    torch.testing.assert_close(ours.train()(x)[0], features, rtol=0, atol=0)


def test_every_parameter_is_trained_by_dense_tasks_alone() -> None:
    tasks = {"parts": {"kind": "segment", "num_classes": 7}}
    model = backbone(config_of("swin_tiny_patch4_window7_224", 64, tasks), dtype=torch.float32)
    features, *earlier = model(torch.randn(1, 3, 64, 64))
    sum(tokens.square().sum() for tokens in (features[:, 1:], *earlier)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_initial_values_are_of_the_seed_alone(timm: Any) -> None:
    """Whatever the generator's state and the device it is built on; tables survive the move off meta."""
    config = config_of("swin_tiny_patch4_window7_224", 64)
    before = torch.random.get_rng_state()
    one = backbone(config)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(7)
    with torch.device("meta"):
        two = TimmBackbone(config).to(torch.float64)
    assert all(parameter.is_meta for parameter in two.parameters())
    two.to_empty(device="cpu")
    initialize(two, 0)
    pairs = list(zip(one.state_dict().items(), two.state_dict().items(), strict=True))
    assert pairs and all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    buffers = dict(
        timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=0).named_buffers()
    )
    assert len(buffers) > 8
    for name, buffer in two.model.named_buffers():
        assert torch.equal(buffer, buffers[name].to(buffer.dtype)), name
    other = backbone(config, seed=1)
    name = "model.layers.0.blocks.0.attn.qkv.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet50_gn", "gmixer_12_224"]
)
def test_distributions_are_timms(name: str, timm: Any) -> None:
    """Mean and deviation of each large parameter, ours and as timm draws it; constants to the bit."""
    ours = backbone(config_of(name), dtype=torch.float32)
    theirs = dict(timm.create_model(name, num_classes=0).named_parameters())
    table = ours.init()
    drawn = 0
    for full, held in ours.named_parameters():
        parameter = held.detach()
        other = theirs[full.removeprefix("model.")].detach()
        if isinstance(table[full], (Constant, Values)):
            assert torch.equal(parameter, other), full
        elif parameter.numel() > 4000:
            drawn += 1
            share = 5 / math.sqrt(parameter.numel())
            assert float(parameter.std()) == pytest.approx(float(other.std()), rel=2 * share), full
            assert abs(float(parameter.mean())) < share * float(parameter.std()) * 2, full
    assert drawn > 10


def test_what_is_done_to_drawn_values_is_followed() -> None:
    """Each way of drawing against its distribution, written down by hand."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = nn.Parameter(0.02 * torch.randn(6))
            self.uniform = nn.Parameter(torch.empty(6))
            nn.init.uniform_(self.uniform, -1.0, 3.0)
            self.truncated = nn.Parameter(torch.empty(6))
            with torch.no_grad():
                self.truncated.uniform_(-1, 1).erfinv_().mul_(0.5).add_(0.0).clamp_(-0.7, 0.7)
            self.once = nn.Parameter(torch.zeros(6))
            nn.init.normal_(self.once, std=3.0)
            nn.init.constant_(self.once, 4.0)
            self.table = nn.Parameter(torch.arange(6.0))
            self.halves = nn.Parameter(torch.empty(2, 3))
            nn.init.normal_(self.halves[0])
            nn.init.zeros_(self.halves[1])

    model, table = recorded(Drawn)
    assert table["scaled"] == Normal(0.02) and table["uniform"] == Uniform(-1.0, 3.0)
    assert table["truncated"] == TruncatedNormal(-1, 1, 0.5, -0.7, 0.7) and table["once"] == Constant(4.0)
    assert isinstance(table["table"], Values)
    index = torch.arange(6)
    halves = table["halves"].values(3, index)
    assert torch.equal(halves[:3], Normal(1.0).values(3, index)[:3]) and torch.equal(
        halves[3:], torch.zeros(3)
    )
    drawn = table["truncated"].values(3, torch.arange(40_000))
    assert float(drawn.abs().max()) <= 0.7 and float(drawn.median().abs()) < 0.01
    # 0.5 erfinv(u) has the deviation 0.5 / sqrt(2), but for what is beyond 0.7, two deviations.
    assert float(drawn.std()) == pytest.approx(0.5 / math.sqrt(2), rel=0.06)
    assert not model.get_parameter("uniform").any() and model.get_parameter("table").any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Parameter(torch.randn(3, 3) @ torch.randn(3, 3)), "drawn in a way that is not followed"),
        (lambda: nn.Parameter(torch.randperm(9).float()), "drawn in a way that is not followed"),
        (lambda: nn.Parameter(torch.empty(3, 3)), "nothing sets it"),
    ],
)
def test_what_is_not_followed_is_refused(make: Callable[[], nn.Parameter], words: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = make()

    with pytest.raises(ValueError, match=rf"initial value of weight .*: .*{words}"):
        recorded(Odd)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("resnet18", 224, "resnet50_gn, a vit"),
        ("swin_tinny", 224, "is not a model of timm"),
        ("pit_ti_224", 224, r"maps of \(27, 27\) and \(14, 14\)"),
        ("efficientnet_b0_g8_gn", 224, "classifies from 1280 channels, and its last map has 320"),
        ("convnext_atto", (4, 32, 32), r"takes images, and model.input_size=\[4, 32, 32\]"),
    ],
)
def test_what_does_not_serve_is_refused(name: str, size: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TimmBackbone(config_of(name, size, DENSE))
    with pytest.raises(ValueError, match="brings its own tokens and stages"):
        VisionConfig(timm="convnext_atto", input_size=32, registers=2, tasks=CLASSIFY)


def test_an_input_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size \[32, 32\] for model.timm=convnext_atto"):
        TimmBackbone(config_of("convnext_atto", 64))(torch.zeros(1, 3, 32, 32))


def test_multiply_adds_are_published_ones() -> None:
    """timm's table: 4.5 G for Swin-T (arXiv 2103.14030), 4.5 G for ConvNeXt-T (arXiv 2201.03545), whose heads
    count 0.77 M."""
    for name in ("swin_tiny_patch4_window7_224", "convnext_tiny"):
        model = TimmBackbone(config_of(name))
        assert model.flops(1) / 2e9 == pytest.approx(4.5, rel=0.02)
        assert copy.deepcopy(model).flops(1) == model.flops(1)
