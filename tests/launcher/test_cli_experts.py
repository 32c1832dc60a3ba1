"""`triptych experts` as a command: what it prints, writes and refuses, and that training goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data_pipeline.images.samples import png, write_shards
from tests.tools.vision_runs import EXPERTS, vision_run, write_run
from triptych.data_pipeline.images.index import MASK
from triptych.launcher import cli


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)
    images = [png(draw.integers(0, 256, (8, 8))) for _ in range(8)]
    labelled = [{"png": image, "cls": str(n % 2).encode()} for n, image in enumerate(images)]
    write_shards(directory / "digits", labelled)
    write_shards(directory / "parity", labelled)
    write_shards(directory / "parts", [{"png": image, MASK: png(np.eye(8))} for image in images])
    return directory


@pytest.fixture(scope="module")
def run_dir(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(vision_run(shards), tmp_path_factory.mktemp("run"))


def execute(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = cli.execute([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_use(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "use.png"
    code, out, _ = execute(capsys, "experts", "use", run_dir, "--out", picture, "--json")
    found = json.loads(out)
    assert code == 0 and picture.is_file() and found["picture"] == str(picture)
    assert [(use["name"], use["task"]) for use in found["uses"]] == [
        (layer, task) for layer in ("blocks.0.mixer", "blocks.1.ffn") for task in ("digits", "parts")
    ]
    assert all(sum(use["shares"]) == pytest.approx(1) for use in found["uses"])
    code, out, _ = execute(capsys, "experts", "use", run_dir, "--task", "digits", "--samples", 3)
    assert code == 0 and "blocks.1.ffn  digits" in out and "parts" not in out


def test_prune(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("experts", "prune", run_dir, "--task", "digits", "--keep-share", 0.6, "--out", tmp_path / "new")
    code, out, _ = execute(capsys, *words, "--dry-run")
    assert code == 0 and "nothing was written" in out and not (tmp_path / "new").exists()
    code, out, _ = execute(capsys, *words, "--json")
    found = json.loads(out)
    assert code == 0 and found["parameters_after"] < found["parameters_before"]
    assert found["layers"][1]["of"] == EXPERTS and found["layers"][1]["share"] >= 0.6
    code, out, _ = execute(capsys, "evaluate", tmp_path / "new", "--json")
    assert code == 0 and json.loads(out)["metrics"] == found["after"]
    code, _, err = execute(capsys, *words)
    assert code == 2 and "is taken; give a new directory" in err


def test_add_task_and_train_it(
    run_dir: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "new", shards / "parity"
    words = ("experts", "add-task", run_dir, "--task", "parity", "--kind", "classify", "--num-classes", 2)
    words += ("--experts", 2, "--data", data, "--valid", data, "--out", out)
    code, said, _ = execute(capsys, *words)
    assert code == 0 and f"triptych train {out / 'config.yaml'}" in said.replace("\n", "")
    trained = tmp_path / "trained"
    code, _, err = execute(
        capsys, "train", out / "config.yaml", "--run-dir", trained, "--in-process", "train.steps=2"
    )
    assert code == 0, err
    before, after = (
        json.loads(execute(capsys, "evaluate", path, "--json")[1])["metrics"] for path in (run_dir, trained)
    )
    assert "parity/top1" in after and {name: after[name] for name in before} == before


def test_wrong_words(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = execute(capsys, "experts", "use", run_dir, "--task", "boxes")
    assert code == 2 and "the model's tasks are digits, parts" in err
    code, _, err = execute(capsys, "experts", "use", tmp_path / "none")
    assert code == 2 and "does not exist" in err
    words = ("experts", "add-task", run_dir, "--task", "x", "--num-classes", 2, "--out", tmp_path / "new")
    code, _, err = execute(capsys, *words, "--kind", "classifi")
    assert code == 2 and "classify" in err and not (tmp_path / "new").exists()
    assert all(execute(capsys, "experts", verb, "--help")[0] == 0 for verb in ("use", "prune", "add-task"))
