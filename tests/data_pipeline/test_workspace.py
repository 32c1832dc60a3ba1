"""Directories that are whole or absent."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from triptych.data_pipeline.workspace import only_builder, replacement


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with only_builder(out), replacement(out) as workspace:
        (workspace / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1" and out.stat().st_mode & 0o777 == 0o755
    with only_builder(out), replacement(out) as workspace:
        (workspace / "b").write_text("2")
        assert (out / "a").exists()
    assert [path.name for path in out.iterdir()] == ["b"]
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("1")
    with pytest.raises(RuntimeError, match="half way"), only_builder(out), replacement(out) as workspace:
        (workspace / "b").write_text("2")
        raise RuntimeError("half way")
    assert [path.name for path in out.iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.building-dead").mkdir()
    (tmp_path / ".other.building-alive").mkdir()
    with only_builder(tmp_path / "out"):
        assert (
            not (tmp_path / ".out.building-dead").exists() and (tmp_path / ".other.building-alive").exists()
        )


def test_builders_wait_for_each_other(tmp_path: Path) -> None:
    out, order = tmp_path / "out", []

    def build(name: str) -> None:
        with only_builder(out):
            order.append(name)
            time.sleep(0.05)
            order.append(name)

    threads = [threading.Thread(target=build, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(order[i] == order[i + 1] for i in (0, 2, 4))
