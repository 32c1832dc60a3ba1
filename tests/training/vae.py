"""A random autoencoder, for the tests of what decodes latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def tiny_vae(path: Path, channels: int = 4, **config: Any) -> Path:
    """A directory with one of twice as many pixels as latents on each side; `config` of AutoencoderKL."""
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=channels,
        **config,
    )
    vae.save_pretrained(path)
    return path
