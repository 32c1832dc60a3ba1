"""Images from checkpoints: what they depend on, what is written beside them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tools.checkpoints import CLASSES, STEP, write_checkpoint
from tests.training.vae import tiny_vae
from triptych import models
from triptych.tools.image_drawer import Drawer, Job
from triptych.tools.images import Array
from triptych.tools.sample_images import SampleReport, in_process, sample_images
from triptych.training.decoding import latent_decoder
from triptych.training.loading import load_model
from triptych.training.pictures import to_uint8
from triptych.training.sampling import Denoiser, SamplerConfig, draw, sample_keys

STEPS = {"steps": 3}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"))


def samples(report: SampleReport) -> tuple[Array, Array]:
    """arr_0 and arr_1 of a report's file."""
    with np.load(report.files["samples"], allow_pickle=False) as found:
        return found["arr_0"], found["arr_1"]


def assert_alike(got: Array, expected: Array) -> None:
    """The same images up to rounding in float32, which may take a byte to its neighbour."""
    assert got.shape == expected.shape and got.dtype == expected.dtype == np.uint8
    difference = np.abs(got.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_a_sample_does_not_depend_on_its_batch(run_dir: Path, tmp_path: Path) -> None:
    whole, labels = samples(sample_images(run_dir, num=7, sampler=STEPS, out=tmp_path / "a"))
    assert whole.shape == (7, 8, 8, 1) and labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert len({picture.tobytes() for picture in whole}) == 7
    for size in (1, 3):
        got, _ = samples(
            sample_images(run_dir, num=7, sampler=STEPS, batch_size=size, out=tmp_path / str(size))
        )
        assert_alike(got, whole)
    # Nor on how many there are.
    more, _ = samples(sample_images(run_dir, num=9, sampler=STEPS, out=tmp_path / "more"))
    assert_alike(more[:7], whole)


def test_samples_are_those_of_the_sampler_itself(run_dir: Path, tmp_path: Path) -> None:
    """Against training.sampling.draw on the weights that load_model reads, without anything of the tool."""
    sampler = {"method": "sde", "steps": 4, "seed": 3, "guidance": {"scale": 2.0, "interval": [0.1, 0.8]}}
    got, labels = samples(
        sample_images(run_dir, num=4, labels=[4, 1], sampler=sampler, out=tmp_path, ema=False)
    )
    assert labels.tolist() == [4, 1, 4, 1]
    module, model, _ = load_model(run_dir, torch.device("cpu"), torch.float32, ema=False)
    assert isinstance(model, models.DiffusionConfig)

    def predict(batch: dict[str, Any]) -> torch.Tensor:
        return module(batch["x"], times=batch["times"], labels=batch["labels"])

    config = SamplerConfig.model_validate(sampler)
    images = draw(
        Denoiser(config_of(run_dir).train.objective, model, predict),
        config,
        sample_keys(3, torch.arange(4)),
        (1, 8, 8),
        {"labels": torch.tensor([4, 1, 4, 1])},
    )
    assert_alike(got, to_uint8(images))


def config_of(run_dir: Path) -> Any:
    """The sections that the checkpoint was written with."""
    from triptych.tools.trained import load_trained

    return load_trained(run_dir, "cpu")


def test_what_the_seed_and_the_label_change(run_dir: Path, tmp_path: Path) -> None:
    def draw_with(name: str, **options: Any) -> Array:
        options = {"num": 2, "labels": [1], "sampler": STEPS, **options}
        return samples(sample_images(run_dir, out=tmp_path / name, **options))[0]

    first = draw_with("first")
    np.testing.assert_array_equal(draw_with("again"), first)
    assert not np.array_equal(draw_with("seed", sampler={**STEPS, "seed": 1}), first)
    assert not np.array_equal(draw_with("label", labels=[2]), first)
    assert not np.array_equal(draw_with("guided", sampler={**STEPS, "guidance": {"scale": 4.0}}), first)


def test_averages_are_taken_where_there_are_any(run_dir: Path, tmp_path: Path) -> None:
    drawn = {
        ema: sample_images(run_dir, num=2, sampler=STEPS, ema=ema, out=tmp_path / str(ema))
        for ema in (None, True, False)
    }
    np.testing.assert_array_equal(samples(drawn[None])[0], samples(drawn[True])[0])
    assert not np.array_equal(samples(drawn[None])[0], samples(drawn[False])[0])
    assert drawn[True].conditions["weights"] == "EMA, decay 0.99"
    assert drawn[False].conditions["weights"] == "the parameters themselves"
    bare = write_checkpoint(tmp_path / "bare", train={"ema": None})
    report = sample_images(bare, num=2, sampler=STEPS)
    # Written with the same weights as those parameters.
    np.testing.assert_array_equal(samples(report)[0], samples(drawn[False])[0])
    with pytest.raises(ValueError, match=r"holds no averages of the parameters \(EMA\).*--no-ema"):
        sample_images(bare, num=2, ema=True)


def test_files_and_sidecar(run_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sampler = {"method": "heun", "steps": 2, "seed": 5, "guidance": {"scale": 1.5, "interval": [0.2, 0.9]}}
    report = sample_images(
        run_dir,
        num=12,
        sampler=sampler,
        batch_size=5,
        out=tmp_path / "out",
        progress=lambda *place: seen.append(place),
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "samples.json",
        "samples.npz",
        "samples.png",
    ]
    assert seen == [(0, 12), (5, 12), (10, 12), (12, 12)]
    with Image.open(report.files["grid"]) as image:
        # Ten columns, two rows of digits enlarged to 32 pixels.
        assert image.size == (10 * 34 + 2, 2 * 34 + 2)
        picture = np.asarray(image)
    whole, _ = samples(report)
    np.testing.assert_array_equal(picture[2:34:4, 2:34:4], whole[0, :, :, 0])
    np.testing.assert_array_equal(picture[36:68:4, 36:68:4], whole[11, :, :, 0])
    told = json.loads(Path(report.files["conditions"]).read_text())
    assert told == json.loads(json.dumps(report.to_json()))
    assert told["checkpoint"] == str(run_dir / "checkpoints" / f"step-{STEP:08d}") and told["step"] == STEP
    assert told["sampler"] == SamplerConfig.model_validate(sampler).model_dump(mode="json")
    assert told["classes"]["fewest"] == 2 and told["classes"]["most"] == 3
    assert told["ema"] == {"decay": 0.99, "warmup": True} and told["num"] == 12 and told["size"] == [8, 8]
    assert {"torch", "numpy"} <= told["versions"].keys() and told["date"].startswith("20")
    assert report.table() is not None


def test_the_default_directory_is_in_the_run(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run")
    for path in (run, run / "checkpoints" / f"step-{STEP:08d}"):
        report = sample_images(path, num=1, sampler={"steps": 1})
        assert Path(report.files["samples"]) == run / "samples" / f"step-{STEP:08d}" / "samples.npz"


def test_a_dry_run_checks_and_writes_nothing(run_dir: Path, tmp_path: Path) -> None:
    before = sorted(run_dir.rglob("*"))
    report = sample_images(run_dir, num=500, out=tmp_path / "out", dry_run=True)
    assert report.files == {} and report.conditions["classes"]["fewest"] == 100
    assert not (tmp_path / "out").exists() and sorted(run_dir.rglob("*")) == before
    with pytest.raises(ValueError, match="not among the model's classes"):
        sample_images(run_dir, labels=[CLASSES], dry_run=True)


def test_the_sampler_of_the_run_is_the_default(tmp_path: Path) -> None:
    images = {"sampler": {"method": "ddim", "steps": 7, "eta": 0.5, "guidance": {"scale": 3.0}}}
    run = write_checkpoint(tmp_path / "run", log={"images": images})

    def sampler(**changes: Any) -> dict[str, Any]:
        return sample_images(run, sampler=changes, dry_run=True).conditions["sampler"]

    assert sampler()["method"] == "ddim" and sampler()["steps"] == 7 and sampler()["eta"] == 0.5
    other = sampler(method="euler", guidance={"channels": 1})
    assert other["eta"] == 0.0 and other["steps"] == 7
    assert other["guidance"] == {"scale": 3.0, "interval": None, "channels": 1}


def test_a_failure_leaves_no_sidecar_beside_the_old_samples(run_dir: Path, tmp_path: Path) -> None:
    report = sample_images(run_dir, num=2, sampler=STEPS, out=tmp_path)
    before = Path(report.files["samples"]).read_bytes()

    def breaks(job: Job) -> Generator[Array, None, None]:
        yield from list(in_process(job))[:1]
        raise KeyError("a worker")

    with pytest.raises(KeyError):
        sample_images(run_dir, num=2, sampler=STEPS, batch_size=1, out=tmp_path, execute=breaks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "samples.png"]
    assert Path(report.files["samples"]).read_bytes() == before


ROPE = {"position": "rope", "rope_scaling": {"kind": "ntk"}, "attention": {"num_heads": 2, "qk_norm": True}}


def test_another_size(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", model=ROPE)
    report = sample_images(run, num=3, sampler=STEPS, size=(16, 12), out=tmp_path / "out")
    whole, _ = samples(report)
    assert whole.shape == (3, 16, 12, 1) and report.conditions["size"] == [16, 12]
    alone, _ = samples(sample_images(run, num=3, sampler=STEPS, size=(16, 12), batch_size=1))
    assert_alike(alone, whole)
    with pytest.raises(ValueError, match=r"--size 10x12 is not divisible by model\.patch_size=4"):
        sample_images(run, size=(10, 12))


def test_text_and_unconditional_models(tmp_path: Path) -> None:
    text = {"kind": "text", "text_size": 6, "text_length": 3}
    pattern = ["attention+none", "cross_attention+gelu"]
    run = write_checkpoint(tmp_path / "text", model={"conditioning": text, "pattern": pattern})
    texts = np.random.default_rng(0).normal(size=(2, 3, 6))
    np.save(tmp_path / "texts.npy", texts)
    np.save(tmp_path / "swapped.npy", texts[::-1])
    options: dict[str, Any] = {"num": 2, "sampler": STEPS, "out": tmp_path / "out"}
    report = sample_images(run, texts=tmp_path / "texts.npy", **options)
    with np.load(report.files["samples"]) as found:
        first = found["arr_0"]
        assert sorted(found) == ["arr_0"] and report.conditions["texts"] == 2
    report = sample_images(run, texts=tmp_path / "swapped.npy", **options)
    with np.load(report.files["samples"]) as found:
        assert not np.array_equal(found["arr_0"], first)
    with pytest.raises(ValueError, match=r"give a \.npy of shape \(texts, 3, 6\)"):
        sample_images(run, **options)
    np.save(tmp_path / "wrong.npy", texts[:, :2])
    with pytest.raises(ValueError, match=r"have shape \(2, 2, 6\); the model wants \(texts, 3, 6\)"):
        sample_images(run, texts=tmp_path / "wrong.npy", **options)
    free = write_checkpoint(tmp_path / "free", model={"conditioning": {"kind": "none"}})
    assert sample_images(free, **options).conditions["classes"] is None
    with pytest.raises(ValueError, match=r"labels \[1\] for a model of model\.conditioning\.kind=none"):
        sample_images(free, labels=[1])
    with pytest.raises(ValueError, match=r"guidance\.scale=2\.0 needs a conditional model"):
        sample_images(free, sampler={"guidance": {"scale": 2.0}})


LATENTS: dict[str, Any] = {
    "model": {"in_channels": 4, "out_channels": 8},
    "data": {"content": "latents", "channels": 4, "vae": {"scale_factor": 0.5}},
}


def test_latents_are_decoded_or_written_as_they_are(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run", **LATENTS)
    report = sample_images(run, num=3, sampler=STEPS, out=tmp_path / "raw")
    assert Path(report.files["conditions"]).name == "latents.json" and "--vae" in report.conditions["note"]
    latents, labels = samples(report)
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == np.float32 and labels.tolist() == [0, 1, 2]
    with Image.open(report.files["grid"]) as image:
        assert image.mode == "RGB"
    vae = tiny_vae(tmp_path / "vae", scaling_factor=0.5)
    report = sample_images(run, num=3, sampler=STEPS, vae=vae, out=tmp_path / "decoded")
    assert report.conditions["vae"] == {"path": str(vae), "scale_factor": 0.5, "shift_factor": 0.0}
    pictures, _ = samples(report)
    decode = latent_decoder(vae, config_of(run).data, torch.device("cpu"))
    assert_alike(pictures, to_uint8(decode(torch.from_numpy(latents))))
    with pytest.raises(ValueError, match=r"made with scale_factor=0\.5 .* has 0\.25"):
        sample_images(run, vae=tiny_vae(tmp_path / "other", scaling_factor=0.25))


def test_a_diverging_model_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "run")
    job_out = tmp_path / "out"

    def diverges(job: Job) -> Generator[Array, None, None]:
        drawer = Drawer(job)
        with torch.no_grad():
            for parameter in drawer.trained.module.parameters():
                parameter.fill_(torch.nan)
        yield drawer.draw(range(job.num))

    with pytest.raises(RuntimeError, match="2 of 2 images are not finite"):
        sample_images(run, num=2, sampler=STEPS, out=job_out, execute=diverges)
    assert not list(job_out.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [1, 5, -1]}, r"labels \[5, -1\] are not among .* from 0 to 4"),
        ({"labels": []}, r"give one or more from 0 to 4"),
        ({"size": (16, 16)}, r"--size 16x16: .*model\.position=sincos draws its own size only, 8x8"),
        ({"sampler": {"method": "rk45"}}, r"the sampler cannot be used: method"),
        ({"sampler": {"steps": 0}}, r"the sampler cannot be used: steps"),
        ({"sampler": {"guidance": {"interval": [0.9, 0.1]}}}, r"guidance\.interval=\[0\.9, 0\.1\]"),
        ({"sampler": {"guidance": {"scale": 2, "channels": 3}}}, r"guidance\.channels=3 is more than"),
        ({"num": 0}, r"--num 0 must be at least 1"),
        ({"batch_size": 0}, r"--batch-size 0 must be at least 1"),
        ({"texts": "a.npy"}, r"texts a\.npy for a model of model\.conditioning\.kind=class"),
        ({"vae": "sd-vae"}, r"this model draws pixels; leave it out"),
    ],
)
def test_what_is_refused(run_dir: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_images(run_dir, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_drawn_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        sample_images(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        sample_images(tmp_path)
    never = write_checkpoint(tmp_path / "never", train={"objective": {"label_drop": 0.0}})
    with pytest.raises(ValueError, match=r"guidance\.scale=2\.0 needs .*label_drop=0"):
        sample_images(never, sampler={"guidance": {"scale": 2.0}})
    video = {"input_size": [4, 8, 8], "hidden_size": 24}
    films = write_checkpoint(tmp_path / "films", model=video)
    with pytest.raises(ValueError, match=r"has 3 dimension\(s\)"):
        sample_images(films)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(run_dir: Path) -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        sample_images(run_dir, device="cuda")


def test_text_models_are_sent_elsewhere(trained_run: Any) -> None:
    with pytest.raises(ValueError, match=r"is of model\.family=lm; images come from family diffusion"):
        sample_images(trained_run.run_dir)
