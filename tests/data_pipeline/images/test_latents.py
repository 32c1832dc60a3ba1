"""`triptych data latents` with a tiny, untrained AutoencoderKL: shards that a run then reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.data_pipeline import ImageDataset, ImageNeeds, LatentsOptions, build_latents
from triptych.data_pipeline.images.description import Description
from triptych.data_pipeline.images.latents import _autoencoder_class, load_vae
from triptych.data_pipeline.images.shards import Shards, find_shards

from .samples import config, image, npy, png, write_shards
from .test_scaling import FACTOR


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder that halves sizes, into 2 channels, with weights of its own."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = _autoencoder_class()(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        layers_per_block=1,
        scaling_factor=FACTOR,
        shift_factor=0.25,
    )
    path = tmp_path_factory.mktemp("vae") / "tiny-vae"
    made.save_pretrained(path)
    return path


def pictures(count: int, size: tuple[int, int] = (16, 16)) -> list[dict[str, bytes]]:
    draw = np.random.default_rng(0)
    return [
        {
            "png": png(draw.integers(0, 256, (*size, 3))),
            "cls": str(n % 3).encode(),
            "txt": f"text {n}".encode(),
        }
        for n in range(count)
    ]


def build(source: object, vae: Path, out: Path, **options: Any) -> Any:
    return build_latents(
        LatentsOptions.model_validate({"source": str(source), "vae": str(vae), "out": str(out), **options})
    )


def arrays(path: Path) -> list[tuple[dict[str, bytes], np.ndarray, np.ndarray]]:
    shards = Shards(find_shards(str(path)))
    found = []
    for n in range(len(shards)):
        members = shards.read(n)
        mean, std = (np.load(io.BytesIO(members.pop(f"{name}.npy"))) for name in ("mean", "std"))
        found.append((members, mean, std))
    return found


def test_each_image_becomes_its_posterior(tmp_path: Path, vae: Path) -> None:
    """Held against encoding each image by itself."""
    samples = pictures(11)
    source = write_shards(tmp_path / "in", samples)
    report = build(
        source, vae, tmp_path / "out", image_size=16, batch_size=4, dtype="float32", samples_per_shard=6
    )
    assert report.manifest.splits == {"": 11} and "all    11 samples in 2 shards" in report.summary()
    found = arrays(tmp_path / "out")
    model = load_vae(vae, "cpu")
    for sample, (members, mean, std) in zip(samples, found, strict=True):
        assert members == {"cls": sample["cls"], "txt": sample["txt"]}
        values = np.asarray(Image.open(io.BytesIO(sample["png"])), np.float32).transpose(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            posterior = model.encode(torch.from_numpy(values)[None]).latent_dist
        assert mean.shape == (2, 8, 8) and mean.dtype == np.float32
        assert np.allclose(mean, posterior.mean[0], atol=1e-5) and np.allclose(
            std, posterior.std[0], atol=1e-5
        )
    told = Description.read(tmp_path / "out")
    assert told is not None and told.latent_std == pytest.approx(
        float(np.std([m for _, m, _ in found])), rel=1e-4
    )
    assert (told.vae, told.scale_factor, told.shift_factor, told.scaled) == ("tiny-vae", FACTOR, 0.25, False)
    assert (told.kind, told.channels, told.size, told.count, told.shards) == ("latents", 2, (8, 8), 11, 2)


def test_a_run_reads_them(tmp_path: Path, vae: Path) -> None:
    """Though an untrained autoencoder's latents have not the deviation that its factor promises."""
    build(write_shards(tmp_path / "in", pictures(9)), vae, tmp_path / "out", image_size=16, vae_id="tiny")
    options: dict[str, Any] = {"content": "latents", "channels": 2, "image_size": 8}
    data = ImageDataset(
        config(str(tmp_path / "out"), vae={"id": "tiny"}, **options), 0, ImageNeeds(num_classes=3)
    )
    found = np.stack([data.sample(i)["x"] for i in range(9)])
    expected = (np.stack([mean for _, mean, _ in arrays(tmp_path / "out")]) - 0.25) * FACTOR
    spread = FACTOR * float(np.mean([std for _, _, std in arrays(tmp_path / "out")], dtype=np.float64))
    assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=5 * spread / found.size**0.5)
    with pytest.raises(ValueError, match=r"holds latents of tiny, not of data.vae.id=sd"):
        ImageDataset(config(str(tmp_path / "out"), vae={"id": "sd"}, **options), 0)


def test_splits_classes_and_reuse(tmp_path: Path, vae: Path) -> None:
    for split, count in (("train", 5), ("valid", 3)):
        write_shards(tmp_path / "in" / split, pictures(count))
        Description("images", 3, (16, 16), count, 1, ("a", "b", "c")).write(tmp_path / "in" / split)
    report = build(tmp_path / "in", vae, tmp_path / "out", image_size=8)
    assert report.manifest.splits == {"train": 5, "valid": 3}
    told = Description.read(tmp_path / "out" / "valid")
    assert told is not None and told.classes == ("a", "b", "c") and told.count == 3
    assert build(tmp_path / "in", vae, tmp_path / "out", image_size=8, batch_size=2).reused
    with pytest.raises(ValueError, match=r"made otherwise \(image_size: 8 -> 16\)"):
        build(tmp_path / "in", vae, tmp_path / "out", image_size=16)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.tar")}
    assert not build(tmp_path / "in", vae, tmp_path / "out", image_size=16, overwrite=True).reused
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.tar")} != first


def test_sizes_for_buckets_and_packing(tmp_path: Path, vae: Path) -> None:
    source = write_shards(tmp_path / "in", [*pictures(3, (16, 32)), *pictures(3, (40, 20)), *pictures(2)])
    build(source, vae, tmp_path / "buckets", sizes=[[8, 16], [16, 8], [8, 8]])
    shapes = [mean.shape for _, mean, _ in arrays(tmp_path / "buckets")]
    assert shapes == [(2, 4, 8)] * 3 + [(2, 8, 4)] * 3 + [(2, 4, 4)] * 2
    data = ImageDataset(
        config(
            str(tmp_path / "buckets"),
            content="latents",
            channels=2,
            buckets={"sizes": [[4, 8], [8, 4], [4, 4]]},
        ),
        0,
        global_batch_size=2,
    )
    assert data.num_images == 8
    build(source, vae, tmp_path / "packs", max_tokens=18, multiple=4)
    # 16 x 32 has 4 x 8 squares of 4, scaled by 0.75; 40 x 20 by 0.6; 16 x 16 fits.
    shapes = [mean.shape for _, mean, _ in arrays(tmp_path / "packs")]
    assert shapes == [(2, 6, 12)] * 3 + [(2, 12, 6)] * 3 + [(2, 8, 8)] * 2
    packing = {"max_tokens": 40, "max_images": 4, "patch_size": 2, "max_image_tokens": 18}
    packed = ImageDataset(config(str(tmp_path / "packs"), content="latents", channels=2, packing=packing), 0)
    assert sum(int(packed.sample(i)["valid"].sum()) for i in range(packed.sources[0].samples_per_epoch)) == 8


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, vae: Path) -> None:
    samples = pictures(6)
    samples[1] = {"cls": b"1"}
    samples[4]["png"] = samples[4]["png"][:300]
    source = write_shards(tmp_path / "in", samples)
    report = build(source, vae, tmp_path / "out", image_size=16)
    assert report.manifest.bad_count == 2 and len(arrays(tmp_path / "out")) == 4
    assert "part-000.tar:001: has no image" in report.manifest.bad[0]
    assert "part-000.tar:004: OSError" in report.manifest.bad[1]
    with pytest.raises(ValueError, match=r"2 inputs cannot be used, more than max_bad_samples=1"):
        build(source, vae, tmp_path / "other", image_size=16, max_bad_samples=1)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_encoded(tmp_path: Path, vae: Path) -> None:
    source = write_shards(tmp_path / "in", [image(1)])
    with pytest.raises(ValueError, match=r"divides sizes by 2, and \[15, 15\] is no multiple"):
        build(source, vae, tmp_path / "out", image_size=15)
    with pytest.raises(ValueError, match=r"divides sizes by 2, and \[3, 3\] is no multiple"):
        build(source, vae, tmp_path / "out", max_tokens=4, multiple=3)
    with pytest.raises(ValueError, match=r"holds no config.json; give the directory of an AutoencoderKL"):
        build(source, tmp_path, tmp_path / "out", image_size=16)
    with pytest.raises(ValueError, match=r"holds no .tar files, nor do its subdirectories"):
        build(vae, vae, tmp_path / "out", image_size=16)
    with pytest.raises(ValueError, match=r"is no directory; give one with image shards"):
        build(tmp_path / "nowhere", vae, tmp_path / "out", image_size=16)


def test_pickled_weights_are_refused(tmp_path: Path, vae: Path) -> None:
    torn = tmp_path / "vae"
    torn.mkdir()
    (torn / "config.json").write_bytes((vae / "config.json").read_bytes())
    torch.save({}, torn / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded as an AutoencoderKL with .safetensors"):
        build(write_shards(tmp_path / "in", [image(1)]), torn, tmp_path / "out", image_size=16)


def test_arrays_are_carried_along(tmp_path: Path, vae: Path) -> None:
    text = npy(np.zeros((4, 2), np.float32))
    source = write_shards(tmp_path / "in", [pictures(1)[0] | {"text.npy": text}])
    build(source, vae, tmp_path / "out", image_size=16)
    ((members, _, _),) = arrays(tmp_path / "out")
    assert members["text.npy"] == text
