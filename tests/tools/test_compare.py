"""Loss curves side by side."""

import json
from pathlib import Path

import pytest

from triptych.tools.compare import compare


def run_dir(path: Path, losses: dict[int, float], torn: str = "") -> Path:
    path.mkdir()
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + torn)
    return path


def test_compares_common_steps_with_the_first_run(tmp_path: Path) -> None:
    first = run_dir(tmp_path / "a", {1: 5.0, 2: 4.0, 3: 3.0})
    second = run_dir(tmp_path / "b", {2: 4.25, 3: 2.5, 4: 1.0}, torn='{"step": 5, "lo')
    found = compare([first, second])
    assert found.steps == (2, 3)
    assert found.losses == ((4.0, 3.0), (4.25, 2.5))
    assert found.difference(0) == 0.0
    assert found.difference(1) == 0.5
    assert found.to_json()["largest_difference"] == {str(first): 0.0, str(second): 0.5}


def test_says_what_cannot_be_compared(tmp_path: Path) -> None:
    first, second = run_dir(tmp_path / "a", {1: 1.0}), run_dir(tmp_path / "b", {2: 1.0})
    with pytest.raises(ValueError, match="two or more"):
        compare([first])
    with pytest.raises(ValueError, match=r"no step in common.*log\.every"):
        compare([first, second])
    with pytest.raises(ValueError, match=r"no run directory.*metrics\.jsonl"):
        compare([first, tmp_path])
