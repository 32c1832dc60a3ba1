"""Sample sets: what numpy reads back, and what is left when writing fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from triptych.tools.images import NpzWriter


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def write(path: Path, whole: np.ndarray, pieces: list[int], labels: np.ndarray | None = None) -> None:
    with NpzWriter(path, whole.shape, whole.dtype, labels) as writer:
        for piece in np.split(whole, np.cumsum(pieces)[:-1]):
            writer.write(piece)


@pytest.mark.parametrize("pieces", [[7], [3, 4], [1, 5, 1]])
@pytest.mark.parametrize("labelled", [True, False])
def test_numpy_reads_what_was_written(tmp_path: Path, pieces: list[int], labelled: bool) -> None:
    whole, labels = images(7), np.arange(7) % 3
    write(tmp_path / "a.npz", whole, pieces, labels if labelled else None)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert sorted(found) == (["arr_0", "arr_1"] if labelled else ["arr_0"])
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], whole)
        if labelled:
            assert found["arr_1"].dtype == np.int64
            np.testing.assert_array_equal(found["arr_1"], labels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_the_file_is_a_function_of_its_content(tmp_path: Path) -> None:
    for name, pieces in (("a.npz", [7]), ("b.npz", [2, 2, 3])):
        write(tmp_path / name, images(7), pieces, np.arange(7))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_latents_stay_floats(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(2, 4, 3, 3)).astype(np.float32)
    write(tmp_path / "latents.npz", latents, [1, 1])
    with np.load(tmp_path / "latents.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], latents)


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path, images(7), [7])
    before = path.read_bytes()
    with pytest.raises(KeyError), NpzWriter(path, (7, 6, 5, 3), np.uint8) as writer:
        writer.write(images(3, seed=1))
        raise KeyError("the drawing of samples")
    with (
        pytest.raises(AssertionError, match="3 of 7 samples"),
        NpzWriter(path, (7, 6, 5, 3), np.uint8) as writer,
    ):
        writer.write(images(3, seed=1))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (images(8), "more than 7"),
        (images(1).astype(np.float32), "float32"),
        (images(1)[:, :5], r"\(5, 5, 3\)"),
    ],
)
def test_pieces_that_do_not_fit(tmp_path: Path, piece: np.ndarray, words: str) -> None:
    with (
        pytest.raises(AssertionError, match=words),
        NpzWriter(tmp_path / "a.npz", (7, 6, 5, 3), np.uint8) as writer,
    ):
        writer.write(piece)
    assert not list(tmp_path.iterdir())


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def almost_full(_: Any) -> Usage:
        return Usage(2**30, 2**30 - 2**20, 2**20)

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    with (
        pytest.raises(OSError, match=r"50000 samples need 9,376 MiB and 1 MiB are free.*--num") as raised,
        NpzWriter(tmp_path / "out" / "a.npz", (50_000, 256, 256, 3), np.uint8),
    ):
        pytest.fail("entered")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "out" / "a.npz")
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_that_fills_up_while_writing(small_disk: Path) -> None:
    piece = np.zeros((1, 512, 1024, 1), dtype=np.uint8)
    with (
        pytest.raises(OSError, match=r"no space left: 4 samples need 3 MiB and .* MiB are free") as raised,
        NpzWriter(small_disk / "a.npz", (4, 512, 1024, 1), np.uint8) as writer,
    ):
        writer.write(piece)
        # Somebody else's file.
        (small_disk / "other").write_bytes(bytes(3 * 2**20))
        for _ in range(3):
            writer.write(piece)
    assert raised.value.errno == errno.ENOSPC
    assert [entry.name for entry in small_disk.iterdir()] == ["other"]
