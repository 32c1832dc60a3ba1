"""`triptych evaluate` of a diffusion run, and of sets of images, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from triptych.data_pipeline.images.digits import build_digits
from triptych.data_pipeline.images.options import DigitsOptions
from triptych.launcher.cli import execute

TINY = [
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.attention.num_heads=2",
    "model.ffn.intermediate_size=16",
    "parallel.dp_shard=1",
    "train.steps=2",
    "train.schedule.warmup=0",
    "train.eval_every=0",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "checkpoint.every=0",
    "log.images=null",
    "log.tensorboard=false",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits run of two steps."""
    folder = tmp_path_factory.mktemp("evaluate-run")
    build_digits(DigitsOptions(out=str(folder / "digits")))
    data = [f"data.sources=[{folder}/digits/train]", f"data.valid=[{folder}/digits/valid]"]
    words = ["train", "configs/diffusion/demo.yaml", *TINY, *data, "--in-process"]
    assert execute([*words, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_is_compared_with_its_own_validation_images(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(run_dir), "--samples", "30", "--steps", "1", "--method", "heun", "--json"]
    assert execute(words) == 0
    found = json.loads(capsys.readouterr().out)
    extractor, sampling = found["conditions"]["extractor"], found["conditions"]["sampling"]
    assert extractor["accuracy"] >= 0.95
    # Two steps of training draw noise, which is recognised about as often as by chance.
    assert 0 <= found["class_agreement"]["value"] < 0.5
    assert found["class_agreement"]["conditions"]["of_reference"] > 0.9
    assert sampling["sampler"]["method"] == "heun" and sampling["num"] == 30
    assert (run_dir / "classifier" / "classifier.json").is_file()


def test_the_samples_can_be_compared_as_a_set(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run there is nothing to train the classifier on."""
    drawn = next(run_dir.glob("samples/*/samples.npz"))
    assert execute(["evaluate", str(drawn), "--reference", str(drawn)]) == 2
    assert "--extractor inception:FILE" in capsys.readouterr().err
    assert execute(["evaluate", str(drawn), "--samples", "3", "--reference", str(drawn)]) == 2
    assert "--samples" in capsys.readouterr().err
    assert execute(["evaluate", str(drawn)]) == 2
    assert "--reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "--baseline"], "--baseline belongs to family lm"),
        (["evaluate", "--samples", "10", "--steps", "1", "--extractor", "eyes"], "'eyes' is unknown"),
        (["sample", "--prompt", "import os"], "--prompt belongs to family lm"),
        (["sample", "--labels", "1,x"], "--labels '1,x' is not a list of numbers"),
        (["sample", "--labels", "10"], "10"),
        (["sample", "--interval", "0.1"], "give 2"),
        (["sample", "--size", "16x16"], "--size 16x16"),
        (["sample", "--size", "16"], "HEIGHTxWIDTH"),
        (["sample", "--num", "0"], "--num 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    run_dir: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = words
    assert execute([verb, str(run_dir), *options]) == 2
    assert told in capsys.readouterr().err


def test_a_dry_run_draws_nothing(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(run_dir), "--num", "4", "--dry-run", "--json", "--out", str(tmp_path / "none")]
    assert execute(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num"] == 4 and found["files"] == {} and not (tmp_path / "none").exists()


def test_samples_keep_their_numbers(run_dir: Path, tmp_path: Path) -> None:
    """Sample 3 is the same image among 4 and among 6, guided and of chosen labels."""
    common = ["--steps", "2", "--labels", "3,7", "--guidance", "2", "--interval", "0.1,0.9", "--seed", "5"]
    arrays = []
    for num in (4, 6):
        out = tmp_path / str(num)
        assert execute(["sample", str(run_dir), "--num", str(num), "--out", str(out), *common]) == 0
        with np.load(out / "samples.npz", allow_pickle=False) as drawn:
            arrays.append(drawn["arr_0"][:4].astype(int))
            assert drawn["arr_1"][:4].tolist() == [3, 7, 3, 7]
    assert np.abs(arrays[0] - arrays[1]).max() <= 1
