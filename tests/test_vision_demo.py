"""The vision demo as a newcomer runs it: one model learns three tasks, and one of them does without the
others' experts."""

import json
from pathlib import Path

import pytest

from tests.test_demo import triptych

CONFIG = Path(__file__).parent.parent / "configs" / "vision" / "demo.yaml"
AT_LEAST = {"digits/top1": 0.95, "shapes/miou": 0.80, "boxes/map50": 0.70}
LOST = 0.01

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_one_model_learns_three_tasks_and_is_pruned_to_one(tmp_path: Path) -> None:
    for task, size in (("classify", "32"), ("segment", "32"), ("detect", "32")):
        triptych(tmp_path, "data", "digits", "--task", task, "--size", size, "--out", f"data/digits-{task}")
    run_dir, pruned = tmp_path / "runs" / "vision", tmp_path / "pruned"
    triptych(tmp_path, "train", str(CONFIG), "--run-dir", str(run_dir))
    whole = json.loads(triptych(tmp_path, "evaluate", str(run_dir), "--json"))
    for name, least in AT_LEAST.items():
        assert whole["metrics"][name] >= least, whole["metrics"]
    triptych(tmp_path, "experts", "prune", str(run_dir), "--task", "digits", "--out", str(pruned))
    rest = json.loads(triptych(tmp_path, "evaluate", str(pruned), "--json"))
    assert rest["metrics"]["digits/top1"] > whole["metrics"]["digits/top1"] - LOST
    assert rest["parameters"] < whole["parameters"]
