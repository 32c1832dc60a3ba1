"""A small classifier, trained in seconds on real images: the extractor where no other is at hand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.tools.image_metrics.features import Features, to_float
from triptych.tools.image_metrics.images import array_images

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "classifier.safetensors", "classifier.json"
FEATURES = 64
STEPS = 500
TRUSTED_ACCURACY = 0.95
"""Below this share on held-out real images a classifier says little about generated ones."""


class Network(nn.Module):
    """Two 3x3 convolutions a stage; stages halve the image until its shorter side has 4 pixels or fewer."""

    def __init__(self, channels: int, size: tuple[int, int], classes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        height, breadth = size
        before = channels
        while min(height, breadth) > 4:
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
            height, breadth, width = height // 2, breadth // 2, min(2 * width, 128)
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * breadth, FEATURES))
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, C, H, W) in [-1, 1] -> features (N, F), logits (N, K)."""
        features = F.silu(self.body(x))
        return features, self.head(features)


@dataclass(frozen=True)
class Description:
    """What is known of a classifier beside its weights."""

    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    accuracy: float
    """Share of the held-out real images that it recognises."""
    held_out: int
    trained_on: int
    data_sha256: str
    """Of the images and labels, held-out ones too."""
    seed: int
    steps: int
    weights_sha256: str


class Classifier:
    """The trained network as an extractor."""

    knows_labels = True
    reads_adm_statistics = False

    def __init__(
        self, network: Network, description: Description, device: str | torch.device = "cpu"
    ) -> None:
        self.description = description
        self.device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self.device)

    @property
    def name(self) -> str:
        """Which classes it tells apart, in short."""
        return f"classifier of {len(self.description.classes)} classes trained here"

    @property
    def identity(self) -> str:
        """The weights' hash."""
        return f"classifier:{self.description.weights_sha256}"

    @property
    def feature_size(self) -> int:
        """In front of the last layer."""
        return FEATURES

    def conditions(self) -> dict[str, Any]:
        """The description, and what the numbers are comparable with."""
        described = asdict(self.description)
        return {
            "name": self.name,
            "features": FEATURES,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in described.items()},
            "note": "numbers of this extractor are comparable with one another, not with published ones",
        }

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Images must have the size and the channels that it was trained on."""
        height, width, channels = shape
        mine = self.description
        if channels != mine.channels:
            raise ValueError(f"{name} has {channels} channels; the classifier was trained on {mine.channels}")
        if (height, width) != mine.size:
            raise ValueError(
                f"{name} has images of {height}x{width} pixels; the classifier was trained on "
                f"{mine.size[0]}x{mine.size[1]}: sample at that size, or train one on images of this size"
            )

    @torch.inference_mode()
    def extract(self, images: np.ndarray) -> Features:
        """images: uint8 (N, H, W, C)."""
        features, logits = self._network(to_float(images, self.device) / 127.5 - 1)
        return Features(features, logits.softmax(1))

    def save(self, directory: Path) -> None:
        """Write weights and description into `directory`, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / WEIGHTS).write_bytes(_weights(self._network))
        described = {"version": FORMAT_VERSION, **asdict(self.description)}
        (directory / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def load_classifier(directory: Path, device: str | torch.device = "cpu") -> Classifier:
    """What `Classifier.save` wrote. Raises ValueError, naming the file, where it is missing or damaged."""
    try:
        stored = json.loads((directory / DESCRIPTION).read_text())
        if stored.pop("version") != FORMAT_VERSION:
            raise ValueError(f"only version {FORMAT_VERSION} is known")
        stored |= {"classes": tuple(stored["classes"]), "size": tuple(stored["size"])}
        described = Description(**stored)
        network = Network(described.channels, described.size, len(described.classes))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory / DESCRIPTION} describes no classifier ({error}); train it again"
        ) from error
    try:
        data = (directory / WEIGHTS).read_bytes()
        if hashlib.sha256(data).hexdigest() != described.weights_sha256:
            raise ValueError("its checksum is not the one that the description records")
        network.load_state_dict(safetensors.torch.load(data))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{directory / WEIGHTS} cannot be read as the classifier's weights ({error}); train it again"
        ) from error
    return Classifier(network, described, device)


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: tuple[str, ...] | None = None,
    held_out_share: float = 0.2,
    steps: int = STEPS,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Classifier:
    """Train on real images: the same arguments give the same weights on the same machine, in one thread.

    images: uint8 (N, H, W, C). labels: integers (N,), 0 to K - 1. classes: names; default: the numbers.
    held_out_share: of each class, kept apart for the accuracy that the description records.
    steps: batches, so that the time does not grow with the data. Each is shifted by up to an eighth of the
    image.
    Raises ValueError for images and labels that do not fit, or a class with fewer than 2 images.
    """
    real = array_images(images, labels, "the classifier's images")
    assert real.labels is not None
    names = classes or tuple(str(number) for number in range(int(real.labels.max(initial=0)) + 1))
    rest, held = _split(real.labels, len(names), held_out_share, seed)
    place = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(real.shape[2], real.shape[:2], len(names))
    network.to(place)
    x, y = to_float(images, place) / 127.5 - 1, torch.from_numpy(real.labels).to(place)
    with _one_thread():
        _fit(network, x[rest], y[rest], steps, batch_size, seed, progress)
    accuracy = _accuracy(network.eval(), x[held], y[held])
    if progress:
        progress(f"classifier: {accuracy:.1%} of {len(held)} held-out real images recognised")
    description = Description(
        classes=names,
        channels=real.shape[2],
        size=real.shape[:2],
        accuracy=accuracy,
        held_out=len(held),
        trained_on=len(rest),
        data_sha256=data_identity(images, real.labels),
        seed=seed,
        steps=steps,
        weights_sha256=hashlib.sha256(_weights(network)).hexdigest(),
    )
    return Classifier(network, description, place)


def load_or_train(
    directory: Path,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int = STEPS,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Classifier:
    """The classifier in `directory` if these images and labels trained it; else a new one, saved there.

    One that cannot be read is replaced, and `progress` told so.
    """
    if (directory / DESCRIPTION).is_file():
        try:
            found = load_classifier(directory, device)
            described = found.description
            if described.data_sha256 == data_identity(images, labels) and described.steps == steps:
                return found
        except ValueError as error:
            if progress:
                progress(str(error))
    trained = train_classifier(images, labels, steps=steps, device=device, progress=progress)
    trained.save(directory)
    return trained


def data_identity(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of shape, pixels and labels."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _split(labels: np.ndarray, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices for training and held-out ones: `share` of each class, at least one image of it in either."""
    if not 0 < share < 1:
        raise ValueError(f"held_out_share={share} must lie between 0 and 1")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} do not fit {classes} classes; "
            f"they must be 0 to {classes - 1}"
        )
    generator = torch.Generator().manual_seed(seed)
    rest, held = [], []
    for number in range(classes):
        mine = torch.from_numpy(np.flatnonzero(labels == number))
        if len(mine) < 2:
            raise ValueError(
                f"class {number} has {len(mine)} image(s); 2 or more are needed, to train and to hold out"
            )
        mine = mine[torch.randperm(len(mine), generator=generator)]
        count = min(max(round(share * len(mine)), 1), len(mine) - 1)
        held.append(mine[:count])
        rest.append(mine[count:])
    return torch.cat(rest), torch.cat(held)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Rounding, and so the weights, depend on the number of threads; and on a busy machine several threads of
    convolutions this small wait for one another for most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    network: Network,
    x: Tensor,
    y: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    progress: Callable[[str], None] | None,
) -> None:
    """AdamW with a cosine from 3e-3 to 0, on batches drawn with replacement."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    height, width = x.shape[2:]
    up, left = height // 8, width // 8
    padded = F.pad(x, (left, left, up, up), mode="replicate")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(x), (batch_size,), generator=generator).to(x.device)
        row, column = (int(torch.randint(2 * most + 1, (), generator=generator)) for most in (up, left))
        _, logits = network(padded[chosen, :, row : row + height, column : column + width])
        loss = F.cross_entropy(logits, y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress and (step + 1) % 100 == 0:
            progress(f"classifier: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}")


@torch.inference_mode()
def _accuracy(network: Network, x: Tensor, y: Tensor) -> float:
    right = sum(
        int((network(part)[1].argmax(1) == truth).sum()) for part, truth in zip(x.split(256), y.split(256))
    )
    return right / len(x)


def _weights(network: Network) -> bytes:
    return safetensors.torch.save(
        {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    )
