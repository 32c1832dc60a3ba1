"""`bench kernels`: every side agrees with the reference; ratios, targets, pictures; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from triptych import kernels
from triptych.tools import bench_kernels as bench
from triptych.tools.bench_kernels import ProblemResult, SideResult, bench_kernels
from triptych.tools.kernel_bench import side
from triptych.tools.kernel_bench.picture import ratio_picture
from triptych.tools.kernel_bench.problem import Draw, Peer, Problem, Target, eight_documents, make_importable
from triptych.tools.kernel_bench.problems import chosen, problems

CPU = torch.device("cpu")
ALL = {problem.name: problem for problem in problems()}
SIDES = [
    (name, beside)
    for name, problem in ALL.items()
    for beside in ("ours", *(peer.name for peer in problem.peers if "cpu" in peer.devices))
]


@pytest.mark.parametrize(("name", "beside"), SIDES)
def test_each_side_computes_the_reference(name: str, beside: str) -> None:
    problem = ALL[name]
    make_importable()
    if any(peer.missing() for peer in problem.peers if peer.name == beside):
        pytest.skip(f"the package of {beside} is not installed")
    assert 0 < side.difference(problem, beside, CPU, torch.float32) < 1e-3


def test_shapes_are_all_there() -> None:
    for problem in ALL.values():
        assert {"cpu", "cuda", "check", "tiny"} <= set(problem.shapes), problem.name
        assert problem.op in kernels.operators()
        names = {peer.name for peer in problem.peers} | set(kernels.forms(problem.op))
        assert {target.peer for target in problem.targets} <= names, problem.name


def test_eight_documents() -> None:
    bounds = eight_documents(2, 64, CPU)
    assert bounds.dtype == torch.int32 and len(bounds) == 17
    assert bounds[0] == 0 and bounds[8] == 64 and bounds[-1] == 128
    assert len(set(bounds.diff().tolist())) > 1, "of uneven lengths"


def test_a_side_that_computes_something_else_is_noticed() -> None:
    wrong = Peer("wrong", lambda gate, up: torch.nn.functional.silu(gate) * up * 1.01)
    swiglu = ALL["swiglu"]
    problem = Problem("swiglu", "swiglu", swiglu.inputs, swiglu.shapes, (wrong,))
    assert side.difference(problem, "wrong", CPU, torch.float32) > 5e-3


def test_numbers_are_a_function_of_their_name() -> None:
    draw = Draw(CPU, torch.bfloat16)
    assert torch.equal(draw.normal("x", 5), draw.normal("x", 5))
    assert not torch.equal(draw.normal("x", 5), draw.normal("y", 5))
    assert draw.normal("a", 3, wide=True).dtype == torch.float32
    assert Draw(CPU, torch.float64).uniform("u", 2.0, 3.0, 9).dtype == torch.float64


def test_quick_run(tmp_path: Path) -> None:
    report = bench_kernels(ops=["swiglu"], quick=True, threads=1, device="cpu", plot=tmp_path / "ratios.png")
    (result,) = report.results
    assert [one.side for one in result.sides] == ["ours", "PyTorch"] and result.ours.form == "torch"
    assert all(one.forward > 0 and one.both > 0 and one.difference < 1e-5 for one in result.sides)
    elements = 16 * 64 * 4
    # Forward reads two and writes one, backward reads these three and writes two.
    assert result.moved_bytes == 8 * elements
    assert result.saved_bytes == 0 and report.ceilings["bytes_per_second"] > 1e8
    assert json.loads(json.dumps(report.to_json()))["results"][0]["problem"] == "swiglu"
    assert report.table() is not None
    assert np.asarray(Image.open(tmp_path / "ratios.png")).std() > 0


def test_targets_are_judged() -> None:
    def one(name: str, both: float, peak: int) -> SideResult:
        return SideResult(name, name, both / 3, both, peak, 1e-7)

    ours, fast, slow = one("ours", 1.0, 100), one("fast", 0.5, 400), one("slow", 20.0, 100)
    problem = ALL["swiglu"]
    for target, reached in [
        (Target("slow", speed=20), True), (Target("slow", speed=21), False), (Target("fast", speed=1), False),
        (Target("fast", memory=0.25), True), (Target("slow", memory=0.25), False),
    ]:  # fmt: skip
        words, ok = bench._judge(problem, target, [ours, fast, slow])
        assert ok is reached and ("MISSED" in words) is not reached
    result = ProblemResult("swiglu", {}, [ours, fast, slow], 1, 0, 0, [("a", True), ("b", False)])
    assert not result.ok and result.ratio(slow) == 20.0


def test_what_is_not_known() -> None:
    with pytest.raises(ValueError, match="op='ssdd' is not measured; use one of"):
        chosen(["ssdd"])
    with pytest.raises(ValueError, match="against='nobody' is no peer of these operators; use some of"):
        bench_kernels(ops=["swiglu"], against=["nobody"], device="cpu")
    with pytest.raises(ValueError, match="dtype='int8' is not one to measure"):
        bench_kernels(dtype="int8", device="cpu")
    with pytest.raises(ValueError, match="device='tpu' is not here; use one of"):
        bench_kernels(device="tpu")


def test_bars_point_both_ways() -> None:
    picture = ratio_picture({"ssd": {"transformers": 40.0, "loop": 0.5}, "swiglu": {"PyTorch": 1.2}})
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {(38, 70, 150), (170, 60, 40)} <= colours


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_compile_at_the_sizes_of_models(target: str) -> None:
    """In a process of its own, as this one's kernels are interpreted."""
    ops = ("ssd", "gated_linear_attention", "linear_cross_entropy", "causal_conv1d", "rms_norm")
    program = (
        "import json\nfrom triptych.tools.kernel_bench.compiled import compiled_kernels\n"
        f"print(json.dumps(compiled_kernels({target!r}, ops={ops!r}).to_json()))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["ok"], "every kernel fits the target's shared memory"
    assert {kernel["problem"].partition(",")[0] for kernel in report["kernels"]} == set(ops)
