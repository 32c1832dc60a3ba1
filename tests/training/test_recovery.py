"""Which checkpoint a run goes on from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from triptych.training import recovery, store
from triptych.training.checkpoint import Checkpointer
from triptych.training.errors import NonFiniteLoss
from triptych.training.group import Group


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The checkpoints of a run: steps 10, 20 and 30."""
    root = tmp_path / "run" / "checkpoints"
    fill(root, [10, 20, 30])
    return root


def fill(root: Path, steps: list[int]) -> None:
    checkpointer = Checkpointer(root, keep=10)
    for step in steps:
        checkpointer.save(step, [], {"step": step})
    checkpointer.wait()


def names(root: Path) -> list[str]:
    return [path.name for path in store.list_steps(root)]


def test_auto_takes_the_newest_or_none(root: Path, tmp_path: Path) -> None:
    assert recovery.choose("auto", root, Group()) == root / "step-00000030"
    assert recovery.choose("auto", tmp_path / "new", Group()) is None


def test_auto_sets_a_corrupt_one_aside(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "step-00000030" / "COMMITTED").unlink()
    assert recovery.choose("auto", root, Group()) == root / "step-00000020"
    assert names(root) == ["step-00000020", "step-00000010"]
    assert (root / "step-00000030.corrupt" / "state.json").is_file()
    assert "step-00000030 is set aside as step-00000030.corrupt" in caplog.text


def test_never_refuses_a_used_directory_unless_restarted(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume=never, but .*holds step-00000030; use another"):
        recovery.choose("never", root, Group())
    assert recovery.choose("never", root, Group(), restarted=True) == root / "step-00000030"
    assert recovery.choose("never", tmp_path / "new", Group()) is None


def test_a_path_elsewhere_serves_until_the_run_has_its_own(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "other" / "checkpoints"
    for path in (root.parent, root, root / "step-00000030"):
        assert recovery.choose(str(path), own, Group()) == root / "step-00000030"
    assert recovery.choose(str(root / "step-00000010"), own, Group()) == root / "step-00000010"
    fill(own, [40])
    assert recovery.choose(str(root / "step-00000010"), own, Group()) == own / "step-00000040"


def test_a_path_within_goes_back(root: Path) -> None:
    target = root / "step-00000010"
    assert recovery.choose(str(target), root, Group(), restarted=True) == root / "step-00000030"
    assert recovery.choose(str(target), root, Group()) == target
    assert names(root) == ["step-00000010"]
    assert (root / "step-00000030.superseded" / "COMMITTED").is_file()


def test_bad_paths_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint; give a run directory"):
        recovery.choose(str(tmp_path / "nowhere"), root, Group())
    (root / "step-00000020" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000020 cannot be used: manifest.json is missing"):
        recovery.choose(str(root / "step-00000020"), tmp_path / "other", Group())


def test_another_model_is_refused_by_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    saved = {
        "model": {"hidden_size": 8, "mamba2": {"chunk_size": 8, "head_dim": 4}, "attention": {"form": None}},
        "train": {"steps": 10, "optimizer": {"lr": 0.1}},
        "data": {"seq_len": 16},
    }
    wanted = json.loads(json.dumps(saved))
    wanted["model"]["mamba2"]["chunk_size"] = 16
    wanted["model"]["attention"]["form"] = "reference"
    wanted["train"] = {"steps": 20, "optimizer": {"lr": 0.2}}
    recovery.check_same_run(tmp_path, saved, wanted)
    assert "train.optimizer.lr=0.2, which was 0.1" in caplog.text and "steps" not in caplog.text
    wanted["model"] |= {"hidden_size": 16, "mamba2": {"chunk_size": 8, "head_dim": 2}}
    with pytest.raises(
        ValueError, match=r"model.hidden_size is 8 there and 16 here; model.mamba2.head_dim is 4 there and 2"
    ):
        recovery.check_same_run(tmp_path, saved, wanted)


def test_non_finite_loss_is_not_retryable_and_travels() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(NonFiniteLoss(7, (1, 3), "the loss", 2)))
    assert not error.retryable
    assert (error.step, error.data_ranks) == (7, (1, 3))
    assert "the loss is not finite in step 7 after 2 skipped steps; it arose on data rank 1, 3" in str(error)
