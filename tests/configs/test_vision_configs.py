"""Every packaged vision configuration: its sizes build, and shrunk it trains, resumes and evaluates through
the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.configs.states import read_all
from tests.configs.vision_shards import write_tasks
from tests.vision_backbones import BACKBONES, SHRUNK, shrunk
from triptych.launcher.cli import execute
from triptych.launcher.config import PACKAGED, load
from triptych.models import VisionConfig
from triptych.models.count import build_on_meta
from triptych.tools.verify import verify
from triptych.training.check import check
from triptych.training.store import load_state

FILES = sorted(path.stem for path in (PACKAGED / "vision").glob("*.yaml"))
FIGURES = {
    "classify": ("top1", "top5"),
    "segment": ("miou",),
    "detect": ("map50", "map"),
}
"""What validation tells of a task of each kind."""


def test_every_configuration_is_covered() -> None:
    assert set(FILES) == set(BACKBONES), "an entry in tests/vision_backbones.py says how to shrink it"


@pytest.fixture
def needed(request: pytest.FixtureRequest) -> None:
    """What a configuration cannot be built without."""
    if request.node.callspec.params["name"] == "timm":
        request.getfixturevalue("timm")


@pytest.mark.usefixtures("needed")
@pytest.mark.parametrize("name", FILES)
def test_every_size_builds(name: str) -> None:
    """On the meta device."""
    values: Any = yaml.safe_load((PACKAGED / "vision" / f"{name}.yaml").read_text())
    for size in (None, *values["model"].get("sizes", ())):
        run = load(f"configs/vision/{name}.yaml", [f"model.size={size}"] if size else [])
        model = build_on_meta(run.model)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) > 1e6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tasks(tmp_path_factory.mktemp("shards"))


def words_of(name: str, data: dict[str, str], *more: str) -> list[str]:
    """The command line that trains a shrunk configuration on random shards."""
    tasks = tasks_of(name)
    sources = ", ".join(f"{{path: {data[task.kind]}, task: {key}}}" for key, task in tasks.items())
    words = [f"configs/vision/{name}.yaml", *SHRUNK, *BACKBONES[name]]
    words += [f"data.sources=[{sources}]", f"data.valid=[{sources}]"]
    words += [
        "train.steps=4",
        "train.eval_every=2",
        "train.eval_samples=6",
        "checkpoint.every=2",
        "log.every=1",
    ]
    return [*words, *more]


def tasks_of(name: str) -> Any:
    model = shrunk(name).model
    assert isinstance(model, VisionConfig)
    return model.tasks


def reports(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("needed")
@pytest.mark.parametrize("name", FILES)
def test_it_trains_resumes_and_evaluates(
    name: str, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one go, and stopped behind the fourth of six steps: the same parameters, moments and data position
    to the bit."""
    words = words_of(name, data, "train.precision=fp64", "train.schedule={kind: constant, warmup: 0}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert execute(["train", *words, "train.steps=6", "--run-dir", str(whole), "--in-process"]) == 0
    assert execute(["train", *words, "--run-dir", str(parts), "--in-process"]) == 0
    assert execute(["train", "--resume", str(parts), "train.steps=6", "--in-process"]) == 0
    told = [report for report in reports(parts) if "loss" in report]
    assert [report["step"] for report in told] == [1, 2, 3, 4, 5, 6]
    assert all(0 < report["loss"] < 1000 and 0 < report["grad_norm"] < math.inf for report in told)
    validated = [report for report in told if report.get("valid_loss") is not None]
    assert [report["step"] for report in validated] == [2, 4, 6]
    assert all(math.isfinite(report["valid_loss"]) for report in validated)
    checkpoints = [directory / "checkpoints" / "step-00000006" for directory in (whole, parts)]
    assert load_state(checkpoints[0])["data"] == load_state(checkpoints[1])["data"]
    tensors = [read_all(directory) for directory in checkpoints]
    assert tensors[0].keys() == tensors[1].keys()
    for tensor_name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][tensor_name]), tensor_name
    capsys.readouterr()
    assert execute(["evaluate", str(parts), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    for key, task in tasks_of(name).items():
        assert math.isfinite(found[f"{key}/loss"])
        for figure in FIGURES.get(task.kind, ()):
            assert 0 <= found[f"{key}/{figure}"] <= 1


@pytest.mark.parametrize("tasks", ["classify", "all"])
def test_a_backbone_of_timm_under_data_sharding(tasks: str, timm: Any) -> None:
    """Losses, gradients and parameters of one process; tensor parallelism and pipelines are refused by
    name."""
    more = {
        "classify": [],
        "all": [
            "model.tasks.parts={kind: segment, num_classes: 3, hidden_size: 8}",
            "data.sources=[{path: one, task: imagenet}, {path: two, task: parts}]",
            "data.valid=null",
        ],
    }[tasks]
    run = shrunk("timm", *more)
    report = verify(run, ("dp_shard2", "dp_replicate2"), steps=3, tolerance=1e-9, synthetic=True, timeout=150)
    assert report.ok, report.to_json()
    assert len(set(report.losses)) == 3
    for layout, words in {
        "tp": "parallel.tp=2 does not serve timm: timm's layers declare no cut; use parallel.tp=1",
        "pp": "parallel.pp=2 does not serve timm: a backbone of timm is one piece; use parallel.pp=1",
    }.items():
        with pytest.raises(ValueError, match=words):
            check(shrunk("timm", *more, f"parallel.{layout}=2"))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", "mamba1", "mamba2", "ss2d", "mlstm", "wkv"])
def test_every_mixer_of_the_metaformer_trains(mixer: str, data: dict[str, str], tmp_path: Path) -> None:
    """The others of the skeleton that above has pooling."""
    small = {"mamba2": ["model.mamba2.head_dim=8"], "mlstm": ["model.mlstm.num_heads=2"]}.get(mixer, [])
    words = words_of("metaformer", data, f"model.size={mixer}", *small)
    assert execute(["train", *words, "--run-dir", str(tmp_path), "--in-process"]) == 0
    told = [report for report in reports(tmp_path) if "loss" in report]
    assert len(told) == 4 and all(0 < report["grad_norm"] < math.inf for report in told)
