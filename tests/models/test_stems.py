"""The convolutional stem and the steps between stages against loops over pixels, and over two ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from triptych.models.init import init_table, initialize
from triptych.models.stems import ConvStem, Downsample
from triptych.models.vision_config import VisionConfig
from triptych.parallel.collectives import Axis
from triptych.parallel.tensor import apply_tensor_parallel


def vision_config(**overrides) -> VisionConfig:
    values = {
        "hidden_size": 8,
        "num_layers": 1,
        "in_channels": 3,
        "input_size": [16, 8],
        "patch_size": 4,
        "stem": "conv",
        "position": "none",
        "attention": {"num_heads": 2},
        "tasks": {"digits": {"kind": "classify", "num_classes": 10}},
    }
    return VisionConfig.model_validate(values | overrides)


def moved(module):
    """Initialised, then moved a little, so that biases and norms are not what they begin with."""
    module = module.double()
    initialize(module, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return module


def normed(x: torch.Tensor, norm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def halved(x: torch.Tensor, conv) -> torch.Tensor:
    """(B, H, W, C) -> (B, H/2, W/2, C'): each output looks at the 3 x 3 pixels around every second one."""
    _, H, W, _ = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    rows = []
    for i in range(0, H, 2):
        row = []
        for j in range(0, W, 2):
            patch = padded[:, i : i + 3, j : j + 3]
            row.append(torch.einsum("bijc,ocij->bo", patch, conv.weight) + conv.bias)
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def stem_by_hand(stem: ConvStem, x: torch.Tensor) -> torch.Tensor:
    y = normed(halved(x.permute(0, 2, 3, 1), stem.conv_in), stem.norm_in)
    y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return normed(halved(y, stem.conv_out), stem.norm_out).flatten(1, 2)


def downsample_by_hand(step: Downsample, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    x = x.unflatten(1, grid)
    if step.conv is not None:
        return normed(halved(x, step.conv), step.norm).flatten(1, 2)
    four = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return (normed(torch.cat(four, -1), step.norm) @ step.proj.weight.T).flatten(1, 2)


def check(module, found, expected, x):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(found)
    sources = [x, *module.parameters()]
    pairs = (torch.autograd.grad((y * weights).sum(), sources) for y in (found, expected))
    for ours, theirs in zip(*pairs):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_stem_and_gradients_equal_a_loop():
    stem = moved(ConvStem(vision_config()))
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64, requires_grad=True)
    found = stem(x)
    assert found.shape == (2, 8, 8)
    check(stem, found, stem_by_hand(stem, x), x)


@pytest.mark.parametrize("kind", ["conv", "merge"])
def test_downsampling_and_gradients_equal_a_loop(kind):
    step = moved(Downsample(6, 10, vision_config(downsample=kind)))
    x = torch.randn(2, 24, 6, dtype=torch.float64, requires_grad=True)
    found = step(x, (4, 6))
    assert found.shape == (2, 6, 10)
    check(step, found, downsample_by_hand(step, x, (4, 6)), x)


def test_parameters_are_those_of_vmamba_and_swin():
    config = vision_config(hidden_size=96)
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in module.parameters())
            for module in (
                ConvStem(config),
                Downsample(96, 192, config),
                Downsample(96, 192, vision_config(downsample="merge")),
            )
        ]
    stem = 3 * 48 * 9 + 48 + 2 * 48 + 48 * 96 * 9 + 96 + 2 * 96
    assert counts == [stem, 96 * 192 * 9 + 192 + 2 * 192, 4 * 96 * 192 + 2 * 4 * 96]


def test_every_parameter_has_an_initial_value():
    for module in (
        ConvStem(vision_config()),
        Downsample(6, 10, vision_config()),
        Downsample(6, 10, vision_config(downsample="merge")),
    ):
        initialize(module, 0)
        assert init_table(module).keys() == dict(module.named_parameters()).keys()
        assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_flops_on_the_meta_device():
    def counted(module, *inputs):
        with FlopCounterMode(display=False) as counter:
            y = module(*inputs)
        return y.shape[1], counter.get_total_flops()

    with torch.device("meta"):
        stem = ConvStem(vision_config())
        length, flops = counted(stem, torch.empty(1, 3, 16, 8))
        assert stem.flops(length) == flops
        for kind in ("conv", "merge"):
            step = Downsample(6, 10, vision_config(downsample=kind))
            length, flops = counted(step, torch.empty(1, 24, 6), (4, 6))
            assert step.flops(length) == flops


def test_the_stream_keeps_its_dtype_under_autocast():
    stem, step = (moved(m).float() for m in (ConvStem(vision_config()), Downsample(8, 10, vision_config())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = stem(torch.randn(1, 3, 16, 8))
        assert (x.dtype, step(x, (4, 2)).dtype) == (torch.float32, torch.float32)


def test_sizes_that_cannot_be_halved_are_refused():
    stem, step = moved(ConvStem(vision_config())), moved(Downsample(6, 10, vision_config()))
    with pytest.raises(ValueError, match=r"size \[10, 8\] is not divisible by 4.*model\.stem=conv"):
        stem(torch.zeros(1, 3, 10, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"model\.stages halve a grid of 3 x 2 tokens, which is odd"):
        step(torch.zeros(1, 6, 6, dtype=torch.float64), (3, 2))
    with pytest.raises(ValueError, match=r"model\.stem=conv halves model\.hidden_size=9"):
        ConvStem(vision_config(hidden_size=9, pattern=["pool"]))


@pytest.mark.parametrize("size", [[16], [8, 16, 16]])
def test_only_images_are_convolved(size):
    with pytest.raises(
        ValueError, match=rf"model\.stem=conv.*has {len(size)} dimension\(s\); use stem: patch"
    ):
        vision_config(input_size=size)


def stream_gradients(kind: str, cut: bool) -> dict[str, torch.Tensor]:
    """Stem and one step after it, whole or with the stream between them cut over two ranks."""
    config = vision_config(downsample=kind)
    model = moved(torch.nn.ModuleList([ConvStem(config), Downsample(8, 10, config)]))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 8, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 2, 10, generator=generator, dtype=torch.float64)
    if cut:
        axis = Axis.of(init_device_mesh("cpu", (dist.get_world_size(),)))
        apply_tensor_parallel(model, axis, sequence_parallel=True)
        weights = weights.chunk(axis.size, 1)[axis.rank]
    y = model[1](model[0](x), (4, 2))
    (y * weights).sum().backward()
    grads = {name: p.grad.full_tensor() if cut else p.grad for name, p in model.named_parameters()}
    return grads | {"tokens of a rank": torch.tensor(y.shape[1])}


@pytest.mark.parametrize("kind", ["conv", "merge"])
def test_two_ranks_find_the_same(kind, distributed):
    expected = stream_gradients(kind, cut=False)
    assert expected.pop("tokens of a rank") == 2
    for found in distributed(2, stream_gradients, kind, True):
        assert found.pop("tokens of a rank") == 1
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11)
