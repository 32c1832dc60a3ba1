"""Bytes, grids and PNG files, read back with Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.training.pictures import GAP, grid, latents_to_uint8, to_uint8, write_png


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_the_nearest_of_256_levels(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.float64)
    within = (levels / 127.5 - 1.0).to(dtype)
    nudged = ((levels + 0.4).clamp(max=255) / 127.5 - 1.0).to(dtype)
    outside = torch.tensor([-7.0, 1.5], dtype=dtype)
    images = torch.cat([within, nudged, outside]).reshape(1, 2, 257, 1)
    got = to_uint8(images)
    assert got.shape == (1, 257, 1, 2) and got.dtype == np.uint8
    flat = got.transpose(0, 3, 1, 2).reshape(-1)
    np.testing.assert_array_equal(flat, np.concatenate([np.arange(256), np.arange(256), [0, 255]]))


def test_channels_go_last() -> None:
    images = torch.rand(2, 3, 4, 5) * 2 - 1
    assert to_uint8(images)[1, 2, 3, 0] == round((float(images[1, 0, 2, 3]) + 1) * 127.5)


def test_what_is_not_finite_is_named() -> None:
    images = torch.zeros(4, 1, 2, 2)
    images[2, 0, 1, 1] = torch.nan
    with pytest.raises(
        RuntimeError, match=r"1 of 4 images are not finite \(the first is number 2 .*diverged"
    ):
        to_uint8(images)


def test_latents_are_stretched_one_by_one() -> None:
    latents = torch.randn(2, 4, 5, 6)
    got = latents_to_uint8(latents)
    np.testing.assert_array_equal(latents_to_uint8(latents * 8), got)
    assert got.shape == (2, 5, 6, 3)
    assert all({0, 255} & set(np.unique(picture)) for picture in got)
    assert latents_to_uint8(latents[:, :2]).shape == (2, 5, 6, 1)
    assert (latents_to_uint8(torch.zeros(1, 4, 2, 2)) == 128).all()


def test_a_grid_reads_like_text() -> None:
    pictures = np.stack([np.full((40, 50, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    whole = grid(pictures, columns=2)
    assert whole.shape == (2 * 40 + 3 * GAP, 2 * 50 + 3 * GAP, 3)
    assert (whole[GAP : GAP + 40, GAP : GAP + 50] == 10).all()
    assert (whole[GAP : GAP + 40, 2 * GAP + 50 : 2 * GAP + 100] == 20).all()
    assert (whole[2 * GAP + 40 : 2 * GAP + 80, GAP : GAP + 50] == 30).all()
    # Gaps, and the place of a fourth.
    assert np.isin(whole, (10, 20, 30)).sum() == 3 * 40 * 50 * 3
    assert grid(pictures, columns=9).shape == (40 + 2 * GAP, 3 * 50 + 4 * GAP, 3)


def test_small_pictures_are_enlarged() -> None:
    picture = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    whole = grid(picture, columns=1)[GAP:-GAP, GAP:-GAP]
    assert whole.shape == (32, 32, 1)
    np.testing.assert_array_equal(whole[::4, ::4], picture[0])
    np.testing.assert_array_equal(whole[3::4, 3::4], picture[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_picture_and_its_notes(tmp_path: Path, channels: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, channels), dtype=np.uint8)
    path = tmp_path / "samples" / "grid.png"
    write_png(path, picture, [("step", "12")])
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)
        assert image.text == {"step": "12"}  # type: ignore[attr-defined]
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]
