"""The packaged language models with experts: shrunk they train, resume and evaluate through the command
line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.configs.states import read_all
from tests.tools.runs import VOCABULARY, write_corpus
from triptych.launcher.cli import execute
from triptych.launcher.config import PACKAGED, load
from triptych.models.count import build_on_meta
from triptych.training.store import load_state

FILES = sorted(path.stem for path in (PACKAGED / "lm").glob("moe*.yaml"))
SHRUNK = (
    f"model.vocab_size={VOCABULARY}",
    "model.hidden_size=16",
    "model.attention.num_heads=2",
    "model.attention.num_kv_heads=2",
    "model.ffn.intermediate_size=24",
    "data.seq_len=16",
    "parallel={}",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.precision=fp64",
    "train.schedule={kind: constant, warmup: 0}",
    "train.eval_every=2",
    "train.eval_samples=6",
    "train.steps=4",
    "checkpoint.every=2",
    "log={every: 1, tensorboard: false}",
    "cluster={use_gpu: false, threads_per_worker: 1}",
)
EXPERTS = ("model.moe.num_experts=4", "model.moe.expert.intermediate_size=8")
MAMBA1 = ("model.mamba1={state_size: 4, chunk_size: 8}", "model.num_layers=8")
CONFIGURATIONS: dict[str, Sequence[str]] = {
    "moe": (*EXPERTS, *MAMBA1),
    "moe-jamba": (*EXPERTS, *MAMBA1),
    "moe-cross-domain": (
        "model.num_layers=8",
        "model.mamba2={state_size: 4, head_dim: 8, num_groups: 2, chunk_size: 8}",
        "model.product_keys={num_experts: 36, num_heads: 2, top_k: 3, key_size: 8}",
    ),
}
"""Name of a file of configs/lm -> what is laid over it."""


def test_every_configuration_is_covered() -> None:
    assert set(FILES) == set(CONFIGURATIONS), "an entry in CONFIGURATIONS says how to shrink it"


@pytest.mark.parametrize("name", FILES)
def test_it_builds(name: str) -> None:
    """On the meta device, where the patterns of the papers stand."""
    run = load(f"configs/lm/{name}.yaml")
    assert sum(parameter.numel() for parameter in build_on_meta(run.model).parameters()) > 1e6
    place = 7 if name == "moe-cross-domain" else 4
    mixers = [spec.mixer for spec in run.model.layer_specs()]
    assert [n for n, mixer in enumerate(mixers) if mixer == "attention"] == list(range(place, len(mixers), 8))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def reports(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_it_trains_resumes_and_evaluates(
    name: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one go, and stopped behind the fourth of six steps: the same parameters and moments to the bit."""
    words = [f"configs/lm/{name}.yaml", *SHRUNK, *CONFIGURATIONS[name]]
    words += [f"data.sources=[{corpus}/train]", f"data.valid=[{corpus}/valid]"]
    words += [f"data.tokenizer={corpus}/tokenizer.json"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert execute(["train", *words, "train.steps=6", "--run-dir", str(whole), "--in-process"]) == 0
    assert execute(["train", *words, "--run-dir", str(parts), "--in-process"]) == 0
    assert execute(["train", "--resume", str(parts), "train.steps=6", "--in-process"]) == 0
    told = [report for report in reports(parts) if "loss" in report]
    assert [report["step"] for report in told] == [1, 2, 3, 4, 5, 6]
    assert all(0 < report["loss"] < 10 and 0 < report["grad_norm"] < math.inf for report in told)
    checkpoints = [directory / "checkpoints" / "step-00000006" for directory in (whole, parts)]
    assert load_state(checkpoints[0])["data"] == load_state(checkpoints[1])["data"]
    tensors = [read_all(directory) for directory in checkpoints]
    assert tensors[0].keys() == tensors[1].keys()
    for tensor_name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][tensor_name]), tensor_name
    capsys.readouterr()
    assert execute(["evaluate", str(parts), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["loss"] < 10
