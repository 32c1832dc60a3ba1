"""Latents to pixels: against the autoencoder itself, and only by the one that made the latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.vae import tiny_vae
from triptych.data_pipeline.images.config import ImageDataConfig
from triptych.data_pipeline.images.description import Description
from triptych.training.decoding import check_vae, latent_decoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae(tmp_path_factory.mktemp("vae") / "tiny", scaling_factor=0.4, shift_factor=0.3)


def data(source: str = "nowhere", **changes: Any) -> ImageDataConfig:
    values = {"kind": "images", "sources": [source], "content": "latents", "image_size": 4, "channels": 4}
    return ImageDataConfig.model_validate(values | changes)


def described(directory: Path, **changes: Any) -> str:
    """A directory of shards (none) with a dataset.json."""
    directory.mkdir()
    Description("latents", 4, (4, 4), 0, 0, **changes).write(directory)
    return str(directory)


def test_decodes_what_the_autoencoder_encoded(vae: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = model.encode(images).latent_dist.mean
        expected = model.decode(z).sample
    decode = latent_decoder(vae, data(), CPU)
    for dtype in (torch.float32, torch.float64):
        got = decode(((z - 0.3) * 0.4).to(dtype))
        assert got.dtype == torch.float32 and got.shape == (2, 3, 8, 8)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_the_run_recorded_is_held_against_it(vae: Path, tmp_path: Path) -> None:
    def factors(source: str = "nowhere", **recorded: Any) -> tuple[float, float]:
        return check_vae(vae, data(source, vae=recorded))

    assert factors() == (0.4, 0.3)
    assert factors(scale_factor=0.4, shift_factor=0.3, id="somebody/tiny") == (0.4, 0.3)
    with pytest.raises(ValueError, match=r"scale_factor=0\.18215 .* but VAE .*tiny has 0\.4"):
        factors(scale_factor=0.18215)
    with pytest.raises(ValueError, match=r"shift_factor=0\.0 .* has 0\.3"):
        factors(shift_factor=0.0)
    with pytest.raises(ValueError, match=r"encoded by somebody/other .*named other"):
        factors(id="somebody/other")
    told = described(tmp_path / "told", vae="somebody/other", scale_factor=0.5)
    with pytest.raises(ValueError, match="encoded by somebody/other"):
        factors(told)
    with pytest.raises(ValueError, match=r"scale_factor=0\.5"):
        factors(told, id="tiny")
    # Shards of scaled latents: the run had a factor of 1 left to do, the decoder has all of it.
    scaled = described(tmp_path / "scaled", scaled=True, scale_factor=0.4, shift_factor=0.3)
    assert factors(scaled, scale_factor=1.0, shift_factor=0.0) == (0.4, 0.3)


def test_what_is_no_decoder(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no config\.json; give the directory of a diffusers"):
        check_vae(tmp_path, data())
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a UNet2DModel"):
        check_vae(tmp_path, data())
    with pytest.raises(ValueError, match="latents of 4 channels, the model draws 8"):
        check_vae(vae, data(channels=8))
    pixels = ImageDataConfig.model_validate({"sources": ["a"], "image_size": 8})
    with pytest.raises(ValueError, match="this model draws pixels"):
        check_vae(vae, pixels)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((vae / "config.json").read_text())
    with pytest.raises(ValueError, match="broken cannot be read"):
        latent_decoder(broken, data(), CPU)
