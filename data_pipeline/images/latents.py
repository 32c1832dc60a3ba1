"""`triptych data latents`: image shards through an autoencoder's encoder, into shards of its posterior.

Each sample keeps its key, label, caption and text embedding; its image becomes mean.npy and std.npy, (C, h,
w), as the encoder gives them, never scaled. dataset.json says by what they are to be scaled, and of which
autoencoder.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from triptych.data_pipeline.images.augment import CENTER, decode, pixels
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.index import IMAGE_SUFFIXES, MAX_PIXELS, MEAN, STD
from triptych.data_pipeline.images.options import LatentsOptions
from triptych.data_pipeline.images.plan import fit_tokens, nearest_bucket
from triptych.data_pipeline.images.shards import Shards, find_shards
from triptych.data_pipeline.images.writing import (
    ImageManifest,
    ImageReport,
    Progress,
    SplitWriter,
    build,
    digest_of,
)
from triptych.data_pipeline.manifest import file_digest

if TYPE_CHECKING:
    import torch

# Samples among which images of one size are gathered for the encoder, in batches.
_WINDOW = 16


def build_latents(options: LatentsOptions, progress: Progress | None = None) -> ImageReport:
    """Builds the shards in options.out, or finds them there.

    Raises RuntimeError without diffusers; ValueError for a source without shards, a directory without an
    autoencoder, sizes that it does not divide, or an `out` taken by something else.
    """
    root, vae_path = Path(options.source), _vae_directory(Path(options.vae))
    splits = _splits(root)
    weights = sorted([*vae_path.glob("*.json"), *vae_path.glob("*.safetensors")])
    vae_digest = digest_of([f"{path.name}\0{file_digest(path)}" for path in weights])
    name = options.vae_id or Path(os.path.abspath(options.vae)).name
    states = [(shard, shard.stat()) for shards in splits.values() for shard in shards]
    digest = digest_of([f"{p.relative_to(root)}\0{s.st_size}\0{s.st_mtime_ns}" for p, s in states])

    def make(directory: Path, manifest: ImageManifest) -> None:
        vae = load_vae(vae_path, options.device)
        for split, paths in splits.items():
            encoder = _Encoder(options, vae, Shards(paths), manifest)
            description = encoder.write(directory / split, split, name, progress)
            source = Description.read(root / split)
            classes = source.classes if source else None
            Description(**{**vars(description), "classes": classes}).write(directory / split)
            manifest.splits[split] = description.count

    recorded = {"source": os.path.abspath(root), "vae": vae_digest, "vae_id": name}
    indifferent = {"batch_size", "device", "max_bad_samples"}
    return build("latents", options, indifferent, digest, make, recorded)


def _splits(root: Path) -> dict[str, list[Path]]:
    """The shards of each split; of "" where the directory itself holds shards."""
    if not root.is_dir():
        raise ValueError(
            f"source={root} is no directory; give one with image shards (`triptych data images`)"
        )
    if any(root.glob("*.tar")):
        return {"": find_shards(str(root))}
    found = {path.name: find_shards(str(path)) for path in sorted(root.iterdir()) if any(path.glob("*.tar"))}
    if not found:
        raise ValueError(f"source={root} holds no .tar files, nor do its subdirectories; give image shards")
    return found


def _vae_directory(path: Path) -> Path:
    for candidate in (path, path / "vae"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"vae={path} holds no config.json; give the directory of an AutoencoderKL (nothing is downloaded)"
    )


def load_vae(path: Path, device: str) -> Any:
    """diffusers' AutoencoderKL from a directory, in float32, for evaluation. Weights are never unpickled."""
    kind = _autoencoder_class()
    try:
        vae = kind.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"vae={path} cannot be loaded as an AutoencoderKL with .safetensors: {error}"
        ) from error
    return vae.float().eval().to(device)


def _autoencoder_class() -> Any:
    import importlib
    import sys

    try:
        importlib.import_module("torchvision")
    except Exception:
        # Not needed here, but transformers, which diffusers imports, takes an installed one, and one built
        # for another torch fails in it. None in this table means: not installed.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise RuntimeError(
            f"latents are encoded by diffusers, which cannot be imported ({error}); pip install "
            "'triptych[hf]'"
        ) from error
    return AutoencoderKL


class _Encoder:
    """One split on its way through the autoencoder."""

    def __init__(self, options: LatentsOptions, vae: Any, shards: Shards, manifest: ImageManifest) -> None:
        self.options, self.vae, self.shards, self.manifest = options, vae, shards, manifest
        self.channels = int(vae.config.in_channels)
        if self.channels not in (1, 3):
            raise ValueError(f"vae={options.vae} takes {self.channels} channels; images have 1 or 3")
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        edge = (options.image_size, options.image_size) if options.image_size else None
        for size in [edge] if edge else options.sizes or [(options.multiple, options.multiple)]:
            if size[0] % self.factor or size[1] % self.factor:
                raise ValueError(
                    f"the autoencoder divides sizes by {self.factor}, and {list(size)} is no multiple of it; "
                    f"use multiples of {self.factor} for image_size, sizes or multiple"
                )
        # Sums over all means: count, sum, sum of squares.
        self.sums = np.zeros(3)

    def write(self, directory: Path, split: str, vae_id: str, progress: Progress | None) -> Description:
        """Encodes everything into `directory`; what is there then."""
        for shard, fault in self.shards.faults:
            self._leave_out(shard, fault)
        writer = SplitWriter(directory, "latents", self.options.samples_per_shard)
        total, window = len(self.shards), _WINDOW * self.options.batch_size
        for first in range(0, total, window):
            numbers = range(first, min(first + window, total))
            for n, members in self._encoded(numbers):
                writer.write(self.shards.name(n).rpartition(":")[2], members)
            if progress:
                progress(f"latents {split}".strip(), numbers.stop, total)
        if not writer.count:
            raise ValueError(
                f"no image of {self.shards.paths[0].parent} can be used: {self.manifest.bad[:3]}"
            )
        config, (count, total_sum, squares) = self.vae.config, self.sums
        size = self.options.image_size
        return Description(
            kind="latents",
            channels=int(config.latent_channels),
            size=(size // self.factor, size // self.factor) if size else None,
            count=writer.count,
            shards=writer.close(),
            vae=vae_id,
            scale_factor=float(config.scaling_factor),
            shift_factor=float(config.get("shift_factor") or 0.0),
            scaled=False,
            latent_std=math.sqrt(max(squares / count - (total_sum / count) ** 2, 0.0)),
        )

    def _leave_out(self, name: str, reason: str) -> None:
        self.manifest.leave_out(name, reason, self.options.max_bad_samples)

    def _encoded(self, numbers: range) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The samples of a window that could be read, in order, with latents in place of images."""
        read: dict[int, dict[str, bytes]] = {}
        images: list[tuple[int, npt.NDArray[np.float32]]] = []
        for n in numbers:
            members = self.shards.read(n)
            image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
            height, width = self.shards.images[n].tolist()
            if image is None or height < 1 or height * width > MAX_PIXELS:
                self._leave_out(self.shards.name(n), "has no image that can be read")
                continue
            try:
                values = pixels(decode(image, self.channels), self._size(n), CENTER, 0)
            except Exception as error:  # Pillow meets damaged data with errors of any kind
                self._leave_out(self.shards.name(n), f"{type(error).__name__}: {error}")
                continue
            read[n] = {name: data for name, data in members.items() if name not in IMAGE_SUFFIXES}
            images.append((n, values))
        # Stable, so that the batches, and with them the last bits, depend on nothing but the window.
        images.sort(key=lambda each: each[1].shape)
        for _, group in groupby(images, key=lambda each: each[1].shape):
            alike = list(group)
            for start in range(0, len(alike), self.options.batch_size):
                batch = alike[start : start + self.options.batch_size]
                means, stds = self._encode(np.stack([values for _, values in batch]))
                for (n, _), mean, std in zip(batch, means, stds):
                    read[n] |= {MEAN: self._npy(mean), STD: self._npy(std)}
        yield from read.items()

    def _size(self, n: int) -> tuple[int, int]:
        """Pixels to which image n is brought."""
        options, size = self.options, self.shards.images[n : n + 1]
        if options.image_size is not None:
            return options.image_size, options.image_size
        if options.sizes is not None:
            return options.sizes[int(nearest_bucket(size, options.sizes)[0])]
        assert options.max_tokens is not None, "refused by LatentsOptions"
        height, width = (
            fit_tokens(size, options.multiple, options.max_tokens)[0] * options.multiple
        ).tolist()
        return height, width

    def _encode(
        self, images: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Means and standard deviations (B, C, h, w) of the posterior of images (B, C, H, W)."""
        import torch

        with torch.no_grad():
            x = torch.from_numpy(images).to(self.options.device)
            posterior = self.vae.encode(x).latent_dist
        mean, std = _numpy(posterior.mean), _numpy(posterior.std)
        wide = mean.astype(np.float64)
        self.sums += (wide.size, wide.sum(), np.square(wide).sum())
        return mean, std

    def _npy(self, values: npt.NDArray[np.float32]) -> bytes:
        file = io.BytesIO()
        np.save(file, values.astype(self.options.dtype), allow_pickle=False)
        return file.getvalue()


def _numpy(values: torch.Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = values.float().cpu().numpy()
    return found
