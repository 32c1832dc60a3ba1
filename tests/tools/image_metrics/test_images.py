"""Reading sets of images, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.tools.image_metrics.images import ImageSet, array_images, holds_images, open_images


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(images: ImageSet, size: int) -> np.ndarray:
    """Batch by batch."""
    batches = list(images.batches(size))
    assert all(len(batch) == size for batch in batches[:-1])
    return np.concatenate(batches)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_npz_is_read_in_pieces(tmp_path: Path, save: object, size: int) -> None:
    images, labels = pixels(7, 5, 4, 3), np.arange(7, dtype=np.int32)
    path = tmp_path / "samples.npz"
    save(path, images, labels)  # type: ignore[operator]
    found = open_images(path)
    assert (found.count, found.shape, found.settings) == (7, (5, 4, 3), None)
    np.testing.assert_array_equal(read(found, size), images)
    # A second pass reads the same.
    np.testing.assert_array_equal(read(found, size), images)
    assert found.labels is not None and found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.labels, labels)


def test_settings_beside_the_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", pixels(2, 4, 4, 1))
    (tmp_path / "samples.json").write_text(json.dumps({"steps": 50}))
    assert open_images(tmp_path / "samples.npz").settings == {"steps": 50}
    (tmp_path / "samples.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"samples\.json holds no JSON object"):
        open_images(tmp_path / "samples.npz")
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(ValueError, match=r"samples\.json cannot be read as the settings of samples\.npz"):
        open_images(tmp_path / "samples.npz")


@pytest.mark.parametrize("channels", [1, 3])
def test_directory_of_png(tmp_path: Path, channels: int) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    images = pixels(5, 6, 4, channels)
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{number:03}.png")
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "pictures.json").write_text('{"sampler": "heun"}')
    found = open_images(folder)
    assert (found.count, found.shape, found.labels) == (5, (6, 4, channels), None)
    assert found.settings == {"sampler": "heun"}
    np.testing.assert_array_equal(read(found, 2), images)


def test_a_directory_of_the_sampler_is_its_set_and_not_its_grid(tmp_path: Path) -> None:
    images = pixels(3, 4, 4, 1)
    np.savez(tmp_path / "samples.npz", images)
    Image.fromarray(pixels(12, 4)).save(tmp_path / "samples.png")
    (tmp_path / "samples.json").write_text('{"step": 7}')
    found = open_images(tmp_path)
    assert (found.count, found.settings) == (3, {"step": 7})
    np.testing.assert_array_equal(found.read(), images)
    (tmp_path / "samples.npz").unlink()
    np.savez(tmp_path / "latents.npz", np.zeros((3, 4, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"latents\.npz holds float32.*latents are decoded first"):
        open_images(tmp_path)


def test_png_with_a_palette_is_read_as_colours(tmp_path: Path) -> None:
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[0, 0] = (255, 0, 10)
    Image.fromarray(colours).quantize(4).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(read(open_images(tmp_path), 1)[0], colours)


def test_png_of_other_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*\.png"):
        open_images(tmp_path)
    Image.fromarray(pixels(4, 4)).save(tmp_path / "a.png")
    Image.fromarray(pixels(4, 5)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has the shape \(4, 5, 1\) and a\.png \(4, 4, 1\)"):
        read(open_images(tmp_path), 2)
    Image.fromarray(pixels(4, 4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read: its mode is RGBA"):
        open_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        open_images(tmp_path)


def test_arrays() -> None:
    images = pixels(5, 4, 4, 1)
    found = array_images(images, np.arange(5))
    np.testing.assert_array_equal(read(found, 2), images)
    with pytest.raises(ValueError, match="arrays has 5 images and labels of shape"):
        array_images(images, np.arange(4))
    with pytest.raises(ValueError, match="labels of digits are float64"):
        array_images(images, np.arange(5.0), "digits")
    with pytest.raises(ValueError, match="float32; images must be uint8"):
        array_images(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"shape \(4, 4, 1\); images must be \(N, H, W, C\)"):
        array_images(images[0])
    with pytest.raises(ValueError, match="arrays holds no image"):
        array_images(images[:0])


def test_what_is_no_sample_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    with pytest.raises(ValueError, match=r"samples\.npz does not exist"):
        open_images(path)
    np.savez(path, images=pixels(2, 4, 4, 1))
    with pytest.raises(ValueError, match="no array arr_0"):
        open_images(path)
    np.savez(path, pixels(2, 4, 4, 1).astype(np.float32))
    with pytest.raises(ValueError, match=r"float32; images must be uint8.*decoded"):
        open_images(path)
    np.savez(path, np.asfortranarray(pixels(2, 4, 4, 3)))
    with pytest.raises(ValueError, match="column by column"):
        open_images(path)
    np.savez(path, pixels(2, 4, 4, 1), np.zeros((2, 10)))
    with pytest.raises(ValueError, match=r"labels of .* are float64"):
        open_images(path)
    np.savez(path, pixels(0, 4, 4, 1))
    with pytest.raises(ValueError, match="holds no image"):
        open_images(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"object; images must be uint8"):
        open_images(path)
    np.savez(path, pixels(1, 4, 4, 1), np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        open_images(path)


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    images = pixels(50, 8, 8, 3)
    np.savez(path, images)
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"samples\.npz cannot be read as an \.npz of samples"):
        open_images(path)
    assert not holds_images(path)
    # One pixel of the last image: the zip's checksum tells.
    place = bytes(whole).index(images[-1].tobytes()) + 5
    whole[place] ^= 1
    path.write_bytes(whole)
    assert holds_images(path)
    with pytest.raises(ValueError, match=r"samples\.npz is damaged: .*CRC"):
        read(open_images(path), 7)


def test_fewer_images_than_the_header_says(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "samples.npz"
    for announced, complaint in ((9, "it ends in image 4 of 9"), (3, "more data follows than 3 images")):
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (announced, 4, 4, 1)}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.write(pixels(4, 4, 4, 1).tobytes())
        with pytest.raises(ValueError, match=complaint):
            read(open_images(path), 2)
