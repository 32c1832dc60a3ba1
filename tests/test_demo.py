"""The demo as a newcomer runs it, and its loss curve on other layouts, through the command line and Ray."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.tools.compare import compare

CONFIG = Path(__file__).parent.parent / "configs" / "lm" / "demo.yaml"
STEPS = 30
# Over this many steps training has not yet blown fp32's rounding up to where it shows.
CURVE_TOLERANCE = 5e-4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the demo's corpus in it."""
    path = tmp_path_factory.mktemp("demo")
    triptych(path, "data", "text", "--source", "stdlib", "--vocab-size", "512", "--out", "data/stdlib-512")
    return path


def triptych(folder: Path, *words: str) -> str:
    """What the command printed, run in `folder` with the command of this environment."""
    command = shutil.which("triptych", path=str(Path(sys.executable).parent))
    assert command, f"no triptych beside {sys.executable}"
    done = subprocess.run([command, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"triptych {' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def train(folder: Path, run_dir: str, *overrides: str) -> Path:
    triptych(folder, "train", str(CONFIG), "--run-dir", run_dir, *overrides)
    return folder / run_dir


def test_demo_beats_the_bigram_model_and_writes_text(folder: Path) -> None:
    run_dir = train(folder, "runs/demo")
    found = json.loads(triptych(folder, "evaluate", str(run_dir), "--baseline", "--json"))
    assert found["beats_bigram"], found
    assert found["loss"] < found["bigram_loss"] - 0.2, "barely better is not what the README shows"
    text = triptych(folder, "sample", str(run_dir), "--prompt", "import os", "--max-new-tokens", "32")
    assert text.startswith("import os")
    assert len(text) > len("import os") + 16


@pytest.fixture(scope="module")
def demo_curve(folder: Path) -> Path:
    """The run directory of the demo's first steps on its own layout."""
    return train(folder, "runs/tp2", *short())


def short() -> list[str]:
    return [f"train.steps={STEPS}", "train.schedule.warmup=10", "train.eval_every=0", "log.every=1"]


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.dp_shard=2", "train.micro_batch_size=4"],
        ["parallel.tp=2", "parallel.pp=2", "parallel.recompute=full", "train.micro_batch_size=4"],
    ],
    ids=["dp_shard2", "tp2.pp2+full"],
)
def test_other_layouts_give_the_demo_s_curve(folder: Path, demo_curve: Path, layout: list[str]) -> None:
    name = "-".join(word.replace("=", "") for word in layout)
    other = train(folder, f"runs/{name}", *short(), "parallel.tp=1", *layout)
    found = compare([demo_curve, other])
    assert len(found.steps) == STEPS
    assert found.difference(1) < CURVE_TOLERANCE
