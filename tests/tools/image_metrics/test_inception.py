"""Inception-v3 against torchvision's, its TensorFlow variant against poolings by hand, files of weights."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from triptych.models.torchvision_shim import prepare_torchvision
from triptych.tools.image_metrics.inception import Inception, resize_like_tensorflow
from triptych.tools.image_metrics.inception_network import InceptionNetwork


def random_network(classes: int, *, tensorflow: bool = False) -> InceptionNetwork:
    """Random weights and running statistics, so that no part of the network is silent."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = InceptionNetwork(classes, tensorflow=tensorflow).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, 0.5, 2.0),
                    (module.bias, -0.5, 0.5),
                ):
                    assert tensor is not None
                    nn.init.uniform_(tensor, low, high)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(random_network(1000).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tensorflow_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(random_network(1008, tensorflow=True).state_dict(), path)
    return path


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_equals_torchvisions() -> None:
    prepare_torchvision()
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    from torchvision.models import inception_v3

    ours = random_network(1000)
    theirs = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        features, logits = ours.double()(x)
        expected = theirs.double()(x)
        theirs.fc = nn.Identity()
        pooled = theirs(x)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(features, pooled, rtol=1e-12, atol=1e-12)


def test_size() -> None:
    with torch.device("meta"):
        network = InceptionNetwork(1000)
        features, logits = network(torch.empty(2, 3, 299, 299))
    # 27,161,264 of torchvision's table, less 3,326,696 of the auxiliary head.
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_834_568
    assert features.shape == (2, 2048) and logits.shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("Mixed_5c", 256, 9), ("Mixed_6e", 768, 6), ("Mixed_7b", 1280, 5)]
)
def test_tensorflows_averages_leave_the_padding_out(name: str, channels: int, size: int) -> None:
    plain, changed = (random_network(8, tensorflow=flag).double() for flag in (False, True))
    x = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # The mean over the neighbours that exist, pixel by pixel.
    mean = torch.empty_like(x)
    for row in range(size):
        for column in range(size):
            rows, columns = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
            mean[:, :, row, column] = x[:, :, rows, columns].mean((2, 3))
    check_pooled_branch(plain.get_submodule(name), changed.get_submodule(name), x, mean)


def test_tensorflows_last_block_takes_the_maximum() -> None:
    plain, changed = (random_network(8, tensorflow=flag).double() for flag in (False, True))
    x = torch.rand(2, 2048, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    shifted = [
        F.pad(x, (1, 1, 1, 1), value=-9.0)[:, :, row : row + 5, column : column + 5]
        for row in range(3)
        for column in range(3)
    ]
    largest = torch.stack(shifted).amax(0)
    check_pooled_branch(plain.get_submodule("Mixed_7c"), changed.get_submodule("Mixed_7c"), x, largest)


@torch.no_grad()
def check_pooled_branch(plain: nn.Module, changed: nn.Module, x: Tensor, pooled: Tensor) -> None:
    """The last channels are those of `pooled`, and no others differ between the two ways of pooling."""
    branch = changed.get_submodule("branch_pool")(pooled)
    found, before = changed(x), plain(x)
    torch.testing.assert_close(found[:, -branch.shape[1] :], branch, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, : -branch.shape[1]], before[:, : -branch.shape[1]], rtol=0, atol=0)
    assert (found - before).abs().max() > 1e-3


def test_tensorflows_resize() -> None:
    # 2 -> 4 pixels: places 0, 0.5, 1, 1.5, the last beyond the edge.
    x = torch.tensor([[0.0, 4.0], [8.0, 20.0]]).reshape(1, 1, 2, 2)
    expected = [
        [0.0, 2.0, 4.0, 4.0],
        [4.0, 8.0, 12.0, 12.0],
        [8.0, 14.0, 20.0, 20.0],
        [8.0, 14.0, 20.0, 20.0],
    ]
    assert resize_like_tensorflow(x, 4)[0, 0].tolist() == expected
    # 6 -> 3: every other pixel, nothing averaged.
    row = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert resize_like_tensorflow(row, 3)[0, 0].tolist() == row[0, 0, ::2, ::2].tolist()
    same = torch.rand(2, 3, 7, 7)
    assert torch.equal(resize_like_tensorflow(same, 7), same)


@torch.no_grad()
def test_features_of_torchvisions_weights(weights: Path) -> None:
    extractor = Inception(weights)
    images = pixels(2, 299, 299, 3)
    seen = extractor.extract(images)
    # At 299 x 299 nothing is resized.
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    features, logits = random_network(1000)(x)
    torch.testing.assert_close(seen.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    assert seen.features.shape == (2, extractor.feature_size)
    assert not extractor.reads_adm_statistics and "not comparable" in extractor.conditions()["note"]


@torch.no_grad()
def test_features_of_tensorflows_weights(tensorflow_weights: Path) -> None:
    extractor = Inception(tensorflow_weights)
    images = pixels(1, 299, 299, 3)
    seen = extractor.extract(images)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 128) / 128
    network = random_network(1008, tensorflow=True)
    features, _ = network(x)
    torch.testing.assert_close(seen.features, features, rtol=1e-4, atol=1e-5)
    # Without the bias of the last layer.
    expected = (features @ network.fc.weight.T).softmax(1)
    torch.testing.assert_close(seen.probabilities, expected, rtol=1e-4, atol=1e-6)
    assert extractor.reads_adm_statistics


def test_grey_images_are_repeated_and_small_ones_enlarged(weights: Path) -> None:
    extractor = Inception(weights)
    grey = pixels(2, 8, 8, 1)
    torch.testing.assert_close(
        extractor.extract(grey).features, extractor.extract(np.repeat(grey, 3, axis=3)).features
    )
    extractor.check("samples", (8, 8, 1))
    with pytest.raises(ValueError, match="samples has 4 channels; Inception sees 3, or 1"):
        extractor.check("samples", (8, 8, 4))


def test_files_of_either_kind_with_and_without_what_is_not_needed(weights: Path, tmp_path: Path) -> None:
    state = random_network(1000).state_dict()
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    state["AuxLogits.fc.weight"] = torch.zeros(1000, 768)
    path = tmp_path / "inception.pth"
    torch.save(state, path)
    images = pixels(1, 32, 32, 3)
    one, other = Inception(path), Inception(weights)
    assert torch.equal(one.extract(images).features, other.extract(images).features)
    # The identity is the file's.
    assert one.identity != other.identity and Inception(weights).identity == other.identity


class Runs:
    """A pickle that would run a function."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not be printed",)


def test_weights_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"none\.pth does not exist.*nothing is downloaded"):
        Inception(tmp_path / "none.pth")
    path = tmp_path / "weights.pth"
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as weights"):
        Inception(path)
    path.write_bytes(pickle.dumps(Runs(), protocol=2))
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as weights"):
        Inception(path)
    assert "must not be printed" not in capsys.readouterr().out
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="no state dict"):
        Inception(path)
    torch.save({"fc.bias": torch.zeros(10)}, path)
    with pytest.raises(ValueError, match="10 classes instead of 1000"):
        Inception(path)
    state = random_network(1000).state_dict()
    for change, complaint in (
        ({"fc.weight": None}, r"1 tensor\(s\) are missing \(such as fc\.weight\)"),
        ({"fc.scale": torch.zeros(1)}, r"1 tensor\(s\) are unknown \(such as fc\.scale\)"),
        ({"fc.weight": torch.zeros(1000, 5)}, r"1 tensor\(s\) have another shape \(such as fc\.weight\)"),
    ):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=rf"weights\.pth does not fit Inception-v3: {complaint}"):
            Inception(path)
    safe = tmp_path / "weights.safetensors"
    safe.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"weights\.safetensors cannot be read as weights"):
        Inception(safe)
