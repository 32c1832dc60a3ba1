"""`triptych data` as it is typed: digits of each task, COCO's JSON, masks, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.launcher.cli import execute


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What the command prints with --json."""
    assert execute(["data", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def picture(path: Path, value: int, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), value, np.uint8)).convert(mode).save(path)


def test_digits_of_several_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for task in ("detect", "segment"):
        words = (
            "digits",
            "--task",
            task,
            "--out",
            str(tmp_path / task),
            "--train-images",
            "9",
            "--valid-images",
            "4",
        )
        report = told(capsys, *words)
        assert report["manifest"]["splits"] == {"train": 9, "valid": 4} and not report["reused"]
        assert report["manifest"]["options"]["size"] == 32 and told(capsys, *words)["reused"]
    out = ("digits", "--out", str(tmp_path / "detect"), "--size", "32")
    assert execute(["data", *out]) == 2
    assert "command: digits --task detect -> digits" in capsys.readouterr().err
    report = told(capsys, *out, "--overwrite")
    assert report["manifest"]["splits"] == {"train": 1438, "valid": 359}
    assert execute(["data", "digits", "--task", "count", "--out", str(tmp_path / "count")]) == 2
    assert "--task: Input should be 'classify', 'detect' or 'segment'" in capsys.readouterr().err


def test_digits_have_a_place_of_their_own_for_each_task(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = told(capsys, "digits", "--task", "segment", "--train-images", "2", "--valid-images", "1")
    assert report["out"] == "data/digits-segment" and (tmp_path / "data/digits-segment/train").is_dir()


def test_coco(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png", 3, "RGB")
    boxes = [{"image_id": 1, "category_id": 5, "bbox": [1, 1, 2, 2], "iscrowd": n} for n in (0, 1)]
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": boxes,
    }
    (tmp_path / "in.json").write_text(json.dumps(content | {"categories": [{"id": 5, "name": "cat"}]}))
    words = ["coco", "--images", str(tmp_path / "in"), "--annotations", str(tmp_path / "in.json")]
    words += ["--out", str(tmp_path / "out"), "--valid-share", "0"]
    made = told(capsys, *words)["manifest"]
    assert (
        made["splits"] == {"train": 1}
        and made["bad_count"] == 1
        and made["dropped"] == {"boxes of crowds": 1}
    )
    assert execute(["data", *words, "--valid-images", str(tmp_path)]) == 2
    assert "go together; give both or neither" in capsys.readouterr().err


def test_masks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / "in" / f"{n}.png", n, "RGB")
        picture(tmp_path / "masks" / f"{n}.png", n, "L")
    words = ["masks", "--images", str(tmp_path / "in"), "--masks", str(tmp_path / "masks")]
    made = told(capsys, *words, "--out", str(tmp_path / "out"), "--valid-share", "0")["manifest"]
    assert made["splits"] == {"train": 3} and made["bad_count"] == 0
    assert execute(["data", *words[:-1], str(tmp_path / "no"), "--out", str(tmp_path / "else")]) == 2
    assert "is no directory" in capsys.readouterr().err
