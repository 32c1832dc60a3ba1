"""From a model's latents to pixels, with the autoencoder that made the latents.

Shape legend: B images, C channels, h and w of a latent, H and W pixels.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triptych.data_pipeline.config import DataConfig
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.images.description import Description


class Recorded(NamedTuple):
    """What a run knows of the autoencoder behind its latents; None where it does not."""

    vae: str | None
    factor: float | None
    shift: float | None


class LatentDecoder:
    """Decodes latents as a model draws them, (z - shift) * factor, in fp32."""

    def __init__(self, vae: Any, factor: float, shift: float) -> None:
        self._vae = vae
        self.factor = factor
        self.shift = shift

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), nearly in [-1, 1]."""
        return self._vae.decode(latents.float() / self.factor + self.shift).sample


def shows_pixels(data: DataConfig | ImageDataConfig) -> bool:
    """Whether what a model of this data draws are pixels, and no latents."""
    return isinstance(data, ImageDataConfig) and data.content == "images"


def latent_decoder(
    path: str | Path, data: DataConfig | ImageDataConfig, device: torch.device
) -> LatentDecoder:
    """The decoder of the diffusers AutoencoderKL in directory `path`, for a model that was trained on `data`.

    Nothing is downloaded. Raises as `check_vae`, and RuntimeError where diffusers is not installed.
    """
    factor, shift = check_vae(path, data)
    return LatentDecoder(_load(Path(path), device), factor, shift)


def check_vae(path: str | Path, data: DataConfig | ImageDataConfig) -> tuple[float, float]:
    """The scale and shift factors of the autoencoder in directory `path`; reads its config.json only.

    Raises ValueError where there is none, or not the one that encoded the data, as far as data.vae and the
    shards' dataset.json tell.
    """
    if not isinstance(data, ImageDataConfig) or data.content != "latents":
        raise ValueError(f"a VAE ({path}) decodes latents, and this model draws pixels; leave it out")
    config = _read_config(Path(path))
    recorded = _recorded(data)
    _check_identity(Path(path), config, recorded)
    factor, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    for key, ours, theirs in (
        ("scale_factor", recorded.factor, factor),
        ("shift_factor", recorded.shift, shift),
    ):
        if ours is not None and not math.isclose(ours, theirs, rel_tol=1e-6):
            raise ValueError(
                f"the run's latents were made with {key}={ours} (data.vae, or dataset.json of its shards), "
                f"but VAE {path} has {theirs}; give the one that encoded them. If the shards held scaled "
                "latents, say so in their dataset.json: scaled: true, with the scale_factor"
            )
    if config["latent_channels"] != data.channels:
        raise ValueError(
            f"VAE {path} has latents of {config['latent_channels']} channels, the model draws "
            f"{data.channels} (data.channels); give the one that encoded the data"
        )
    return factor, shift


def _read_config(path: Path) -> dict[str, Any]:
    file = path.expanduser() / "config.json"
    if not file.is_file():
        raise ValueError(
            f"VAE {path}: there is no config.json; give the directory of a diffusers AutoencoderKL on this "
            "machine, as save_pretrained writes it"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"VAE {path} is a {config.get('_class_name')}; give the directory of an AutoencoderKL"
        )
    return config


def _recorded(data: ImageDataConfig) -> Recorded:
    """data.vae, filled up by dataset.json of the first source where that is still there."""
    told = None
    directory = Path(data.sources[0].path).expanduser()
    if directory.is_dir():
        told = Description.read(directory)
    vae = data.vae
    if told is None:
        return Recorded(vae.id, vae.scale_factor, vae.shift_factor)
    if told.scaled:
        # data.vae.scale_factor, if given, is then 1: what was left to do.
        return Recorded(vae.id or told.vae, told.scale_factor, told.shift_factor)
    return Recorded(
        vae.id or told.vae,
        told.scale_factor if vae.scale_factor is None else vae.scale_factor,
        told.shift_factor if vae.shift_factor is None else vae.shift_factor,
    )


def _check_identity(path: Path, config: dict[str, Any], recorded: Recorded) -> None:
    """Raises ValueError unless the directory goes by the name that is recorded, whole or its last part."""
    if recorded.vae is None:
        return
    names = {str(path), path.expanduser().resolve().name, str(config.get("_name_or_path"))}
    if not names & {recorded.vae, Path(recorded.vae).name}:
        raise ValueError(
            f"the run's latents were encoded by {recorded.vae} (data.vae.id, or dataset.json of its shards), "
            f"and VAE {path} goes by another name; give the directory of that one, named "
            f"{Path(recorded.vae).name}"
        )


def _load(path: Path, device: torch.device) -> Any:
    try:
        # The module itself: diffusers as a whole takes several seconds more to import.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise RuntimeError(
            f"decoding latents needs diffusers ({error}); pip install 'triptych[hf]'"
        ) from error
    # It recommends another package for loading, on every load.
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        vae = AutoencoderKL.from_pretrained(str(path.expanduser()), local_files_only=True)
    except OSError as error:
        raise ValueError(f"VAE {path} cannot be read: {error}") from error
    return vae.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
