"""Inception-v3 as a feature extractor, with weights from a local file."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.tools.image_metrics.features import Features, to_float
from triptych.tools.image_metrics.inception_network import FEATURES, InceptionNetwork

SIZE = 299
TORCHVISION_CLASSES, TENSORFLOW_CLASSES = 1000, 1008

_NOTES = {
    TORCHVISION_CLASSES: "torchvision's ImageNet weights; published FIDs use TensorFlow's Inception of 2015, "
    "whose features are others: not comparable with them",
    TENSORFLOW_CLASSES: "a port of TensorFlow's Inception of 2015, which published FIDs use; "
    "agreement with the original graph was not measured here",
}


class Inception:
    """2048 pooled features and class probabilities of images with 1 (repeated) or 3 channels.

    The number of classes in the file says which network it is:

    1000: torchvision's `inception_v3`. Images are resized by antialiased bilinear interpolation to 299 x 299
    and scaled to [-1, 1].

    1008: the port of TensorFlow's Inception of 2015-12-05 (pt_inception-2015-12-05 of pytorch-fid). It
    pools otherwise (`InceptionNetwork`), the image is resized as TensorFlow 1 does and scaled by
    (x - 128) / 128, and the logits have no bias, as in ADM's evaluator.
    """

    knows_labels = False

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        """weights: a state dict saved by torch.save, or safetensors; nothing in it is executed.

        Raises ValueError where the file is not such weights.
        """
        path = Path(weights).expanduser()
        state = read_weights(path)
        self.classes = len(state["fc.bias"]) if "fc.bias" in state else 0
        if self.classes not in _NOTES:
            raise ValueError(
                f"{path} holds no Inception-v3: its last layer has {self.classes} classes instead of "
                f"{TORCHVISION_CLASSES} (torchvision) or {TENSORFLOW_CLASSES} (TensorFlow's of 2015)"
            )
        self.path, self.device = path, torch.device(device)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._tensorflow = self.classes == TENSORFLOW_CLASSES
        self._network = _load(path, state, self.classes).to(self.device)

    @property
    def name(self) -> str:
        """Which of the two networks."""
        return "Inception-v3 (TensorFlow 2015)" if self._tensorflow else "Inception-v3 (torchvision)"

    @property
    def identity(self) -> str:
        """The weights' hash says the treatment too."""
        return f"inception:{self.sha256}"

    @property
    def feature_size(self) -> int:
        """2048, behind the global average pooling."""
        return FEATURES

    @property
    def reads_adm_statistics(self) -> bool:
        """ADM's statistics are of TensorFlow's network."""
        return self._tensorflow

    def conditions(self) -> dict[str, Any]:
        """Weights, their hash, treatment of the images, and what the numbers are comparable with."""
        resize = "bilinear as TensorFlow 1" if self._tensorflow else "bilinear, antialiased"
        return {
            "name": self.name,
            "weights": str(self.path),
            "weights_sha256": self.sha256,
            "features": FEATURES,
            "classes": self.classes,
            "resize": f"{resize}, to {SIZE}x{SIZE}",
            "note": _NOTES[self.classes],
        }

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Any size; 1 or 3 channels."""
        if shape[2] not in (1, 3):
            raise ValueError(f"{name} has {shape[2]} channels; Inception sees 3, or 1 that it repeats")

    @torch.inference_mode()
    def extract(self, images: np.ndarray) -> Features:
        """images: uint8 (N, H, W, 1 or 3)."""
        x = to_float(images, self.device).expand(-1, 3, -1, -1)
        if self._tensorflow:
            x = (resize_like_tensorflow(x, SIZE) - 128) / 128
        else:
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
            x = x / 127.5 - 1
        features, logits = self._network(x)
        return Features(features, logits.softmax(1))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or one by torch.save, by name. Raises ValueError for all else."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; give a local file of Inception-v3 weights (nothing is downloaded)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        pickle.UnpicklingError,
        _safetensors_error(),
    ) as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (tensors by name); save model.state_dict()")
    return state


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _load(path: Path, state: dict[str, Tensor], classes: int) -> InceptionNetwork:
    """The network in eval mode, with these weights."""
    network = InceptionNetwork(classes, tensorflow=classes == TENSORFLOW_CLASSES)
    wanted = network.state_dict()
    # The auxiliary head serves training only.
    state = {name: value for name, value in state.items() if not name.startswith("AuxLogits.")}
    # Older files have no counters of batches, which evaluation does not read.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    for problem, names in (
        ("are missing", missing),
        ("are unknown", [name for name in state if name not in wanted]),
        (
            "have another shape",
            [name for name, value in state.items() if name in wanted and wanted[name].shape != value.shape],
        ),
    ):
        if names:
            raise ValueError(
                f"{path} does not fit Inception-v3: {len(names)} tensor(s) {problem} (such as {names[0]})"
            )
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False)


def resize_like_tensorflow(x: Tensor, size: int) -> Tensor:
    """Bilinear resize of (N, C, H, W) to (N, C, size, size) as TensorFlow 1 does.

    Output pixel i stands at i * H / size of the input: corners, not centres, are aligned at the upper left,
    and nothing is averaged where the image shrinks.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(size, device=x.device, dtype=x.dtype) * (length / size)
        low = place.long()
        high = (low + 1).clamp_max(length - 1)
        share = (place - low).view(-1, *[1] * (3 - dim))
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
    return x
