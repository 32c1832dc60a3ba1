"""A run that starts from another run's parameters: which are taken, resized, left alone, on any layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tools import checkpoints
from tests.training.runs import Fault, Stopped, fit, fit_changed, make_run, write_corpus
from triptych import models
from triptych.training import store
from triptych.training.finetune import POSITIONS, FinetuneConfig, Report, resize_positions, start_from
from triptych.training.group import Group
from triptych.training.shards import Window

LEARNED = {
    "family": "diffusion",
    "hidden_size": 16,
    "num_layers": 2,
    "attention": {"num_heads": 2},
    "in_channels": 1,
    "input_size": [8, 12],
    "patch_size": 4,
    "position": "learned",
    "conditioning": {"kind": "class", "num_classes": 5},
}


def tensors(directory: Path, prefix: str = "model/") -> dict[str, Tensor]:
    """Whole tensors of a checkpoint by the rest of their names."""
    found = {}
    with store.open_reader(directory) as reader:
        for name, entry in reader.index.items():
            if name.startswith(prefix):
                tensor = torch.empty(entry.shape, dtype=torch.float64)
                reader.read_into(Window(name, tensor, entry.shape, (0,) * len(entry.shape)))
                found[name.removeprefix(prefix)] = tensor
    return found


def started(changes: dict[str, Any], **options: Any) -> tuple[Report, dict[str, Tensor], dict[str, Tensor]]:
    """Report, parameters afterwards, and initial values, of a denoiser that is LEARNED but for `changes`."""
    config = models.read_config({**LEARNED, **changes})
    model = models.build(config)
    models.initialize(model, 3)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    windows = [
        Window(name, p.detach(), tuple(p.shape), (0,) * p.ndim) for name, p in model.named_parameters()
    ]
    report = start_from(windows, FinetuneConfig(**options), config, Group())
    return report, {window.name: window.tensor for window in windows}, initial


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("denoiser"), model=LEARNED)


@pytest.mark.parametrize(("old", "new"), [((3, 4), (6, 5)), ((6, 5), (3, 4)), ((4, 4), (4, 4))])
def test_positions_are_interpolated_on_their_grid(old: tuple[int, int], new: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(old[0] * old[1], 3, generator=generator, dtype=torch.float64)
    resized = resize_positions(table, old, new)
    for channel in range(3):
        image = table[:, channel].reshape(1, 1, *old)
        expected = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
        torch.testing.assert_close(resized[:, channel], expected.flatten(), rtol=0, atol=1e-14)
    constant = resize_positions(torch.full_like(table, 0.7), old, new)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.7), rtol=0, atol=1e-12)
    if old == new:
        torch.testing.assert_close(resized, table, rtol=0, atol=1e-14)


def test_positions_along_one_axis_and_three() -> None:
    line = resize_positions(torch.tensor([[0.0], [1.0]]), (2,), (4,))
    torch.testing.assert_close(line, torch.tensor([[0.0], [0.25], [0.75], [1.0]]))
    video = torch.arange(8.0).reshape(8, 1)
    expected = F.interpolate(video.reshape(1, 1, 2, 2, 2), size=(2, 4, 2), mode="trilinear")
    torch.testing.assert_close(resize_positions(video, (2, 2, 2), (2, 4, 2)).flatten(), expected.flatten())


def test_another_size_and_other_classes(denoiser: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {
        "input_size": [16, 16],
        "conditioning": {"kind": "class", "num_classes": 7},
        "long_skips": True,
    }
    report, now, initial = started(changes, checkpoint=str(denoiser))
    there = tensors(denoiser / "checkpoints" / f"step-{checkpoints.STEP:08d}", "ema/")
    assert report.resized == (POSITIONS,)
    assert report.left == {
        "label_embedding.weight": "(6, 16) there, (8, 16) here",
        "blocks.1.skip.proj.weight": "not there",
        "blocks.1.skip.proj.bias": "not there",
    }
    assert {*report.taken, *report.resized, *report.left} == now.keys()
    for name in report.left:
        torch.testing.assert_close(now[name], initial[name], rtol=0, atol=0)
        assert name in caplog.text
    for name in report.taken:
        torch.testing.assert_close(now[name].double(), there[name], rtol=0, atol=0)
    image = there[POSITIONS].T.reshape(1, 16, 2, 3)
    expected = F.interpolate(image, size=(4, 4), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(now[POSITIONS].double(), expected[0].reshape(16, 16).T, rtol=0, atol=1e-6)


def test_parameters_or_averages_and_what_is_skipped(denoiser: Path) -> None:
    directory = denoiser / "checkpoints" / f"step-{checkpoints.STEP:08d}"
    for averages, prefix in ((None, "ema/"), (True, "ema/"), (False, "model/")):
        report, now, initial = started(
            {}, checkpoint=str(directory), averages=averages, skip=["head.*", "blocks.0.*"]
        )
        there = tensors(directory, prefix)
        skipped = {name for name in now if name.startswith(("head.", "blocks.0."))}
        assert report.left.keys() == skipped and set(report.left.values()) == {"train.finetune.skip"}
        for name, tensor in now.items():
            expected = initial[name].double() if name in skipped else there[name]
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=0)


def test_positions_may_begin_anew(denoiser: Path) -> None:
    report, now, initial = started({"input_size": [16, 16]}, checkpoint=str(denoiser), resize_positions=False)
    assert report.left == {POSITIONS: "(6, 16) there, (16, 16) here"}
    torch.testing.assert_close(now[POSITIONS], initial[POSITIONS], rtol=0, atol=0)


def test_what_cannot_be_is_refused(denoiser: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"skip: 'heads\.\*' matches no parameter"):
        started({}, checkpoint=str(denoiser), skip=["heads.*"])
    with pytest.raises(ValueError, match=r"nothing in .* fits this model: .*there, .* here"):
        started({"hidden_size": 24, "in_channels": 2}, checkpoint=str(denoiser))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        started({}, checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match=r"positions on the grid \[2, 3\], and this model on \[4\]"):
        started({"input_size": [16]}, checkpoint=str(denoiser))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory)
    return directory


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps from which the others start."""
    run_dir = tmp_path_factory.mktemp("base")
    fit(make_run(corpus), run_dir)
    return run_dir


FREEZE = ["blocks.0.*", "blocks.1.ffn.up_proj.weight[3:12]"]


def second(base: Path, **train: Any) -> dict[str, Any]:
    """A run that starts from `base`, parts frozen, layers at their own rates."""
    options = {
        "steps": 4,
        "finetune": {"checkpoint": str(base)},
        "freeze": FREEZE,
        "optimizer": {"lr": 0.01, "layer_decay": 0.5},
        "schedule": {},
        "ema": {"decay": 0.9},
    }
    return {"train": {**options, **train}, "checkpoint": {"every": 2}}


@pytest.fixture(scope="module")
def finetuned(corpus: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    run_dir = tmp_path_factory.mktemp("finetuned")
    reports = fit_changed(corpus, run_dir, {**second(base), "model": model_with_bias(corpus)})
    return [report.loss for report in reports], run_dir


def model_with_bias(corpus: Path) -> dict[str, Any]:
    """Feed-forwards of `make_run`'s model with biases, which the base has not got."""
    model = make_run(corpus).model
    return {"ffn": {**model.ffn.model_dump(), "bias": True}}


def last(run_dir: Path, prefix: str = "model/") -> dict[str, Tensor]:
    return tensors(store.list_steps(run_dir / "checkpoints")[0], prefix)


def test_the_frozen_part_is_the_other_runs_bit_by_bit(
    base: Path, finetuned: tuple[list[float], Path]
) -> None:
    old, new, averages = last(base), last(finetuned[1]), last(finetuned[1], "ema/")
    assert new.keys() - old.keys() == {
        f"blocks.{layer}.ffn.{part}_proj.bias" for layer in (0, 1) for part in ("gate", "up", "down")
    }
    for name, tensor in old.items():
        same = (new[name] == tensor) & (averages[name] == tensor)
        if name.startswith("blocks.0."):
            assert same.all(), name
        elif name == "blocks.1.ffn.up_proj.weight":
            assert same[3:12].all() and not same[:3].any() and not same[12:].any()
        else:
            assert not same.all(), name
    moments = {name.rpartition("/")[0] for name in last(finetuned[1], "optimizer/")}
    assert moments == {name for name in new if not name.startswith("blocks.0.")}


@pytest.mark.parametrize("parallel", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}], ids=["dp_shard2", "tp2", "pp2"])
def test_any_layout_starts_and_freezes_alike(
    corpus: Path,
    base: Path,
    finetuned: tuple[list[float], Path],
    tmp_path: Path,
    distributed: Callable[..., list[Any]],
    parallel: dict[str, Any],
) -> None:
    changes = {**second(base), "model": model_with_bias(corpus), "parallel": parallel}
    reports = distributed(2, fit_changed, corpus, tmp_path, changes)[0]
    assert [report.loss for report in reports] == pytest.approx(finetuned[0], rel=1e-10)
    got, expected = last(tmp_path, ""), last(finetuned[1], "")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 1e-9 * (tensor.abs().max() + 1e-30), name
    old, new = last(base), last(tmp_path)
    assert all(bool((new[name] == old[name]).all()) for name in old if name.startswith("blocks.0."))


def test_a_resumed_run_does_not_start_again(
    corpus: Path, base: Path, finetuned: tuple[list[float], Path], tmp_path: Path
) -> None:
    """Nor does it look at the other run, which may be gone."""
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    run = make_run(corpus, **{**second(copy), "model": model_with_bias(corpus)})
    with pytest.raises(Stopped):
        fit(run, tmp_path / "run", Fault("stop", at=3))
    shutil.rmtree(copy)
    assert [report.loss for report in fit(run, tmp_path / "run")] == finetuned[0][2:]


def test_what_was_frozen_cannot_be_trained_on_resuming(
    corpus: Path, base: Path, finetuned: tuple[list[float], Path], tmp_path: Path
) -> None:
    shutil.copytree(finetuned[1], tmp_path / "run")
    changed = {**second(base, freeze=[], steps=6), "model": model_with_bias(corpus)}
    with pytest.raises(ValueError, match=r"no moments of blocks\.0\..* which was not trained there"):
        fit(make_run(corpus, **changed), tmp_path / "run")
    more = {**second(base, freeze=[*FREEZE, "norm.*"], steps=6), "model": model_with_bias(corpus)}
    assert [report.step for report in fit(make_run(corpus, **more), tmp_path / "run")] == [5, 6]


def test_a_pattern_of_no_parameter_is_refused_before_anything_is_built(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, train={"freeze": ["blokcs.*"]})
    with pytest.raises(ValueError, match=r"train.freeze: 'blokcs\.\*' matches no parameter"):
        fit(run, tmp_path)


def test_the_start_says_how_much_is_trained(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="triptych.training.session")
    run = make_run(corpus, train={"steps": 1, "schedule": {}, "freeze": ["blocks.*"]})
    fit(run, tmp_path)
    total = sum(p.numel() for p in models.build(run.model).parameters())
    # Embedding and head of 32 words, and the last norm.
    assert f"training {2 * 32 * 16 + 16} of {total} parameters" in caplog.text
