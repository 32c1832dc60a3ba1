"""The digits demo as a newcomer runs it: three backbones draw digits that a classifier of real ones
recognises."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_demo import triptych

CONFIGS = Path(__file__).parent.parent / "configs" / "diffusion"
RECOGNISED = 0.8
CLASSIFIER = 0.95

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the digits in it."""
    path = tmp_path_factory.mktemp("digits")
    triptych(path, "data", "digits", "--out", "data/digits")
    return path


@pytest.mark.parametrize("name", ["demo", "demo-mamba", "demo-hybrid"])
def test_drawn_digits_are_recognised(folder: Path, name: str) -> None:
    run_dir = folder / "runs" / name
    triptych(folder, "train", str(CONFIGS / f"{name}.yaml"), "--run-dir", str(run_dir))
    found = json.loads(triptych(folder, "evaluate", str(run_dir), "--samples", "500", "--json"))
    agreement = found["class_agreement"]
    assert agreement["conditions"]["samples"] == 500
    assert agreement["value"] >= RECOGNISED
    assert found["conditions"]["extractor"]["accuracy"] >= CLASSIFIER
    (samples,) = (run_dir / "samples").glob("*/samples.npz")
    with np.load(samples, allow_pickle=False) as drawn:
        assert drawn["arr_0"].shape == (500, 8, 8, 1) and drawn["arr_0"].dtype == np.uint8
        assert np.array_equal(np.bincount(drawn["arr_1"]), [50] * 10)
    grids = sorted((run_dir / "samples").glob("step-*.png"))
    assert grids and np.asarray(Image.open(grids[-1])).std() > 10
