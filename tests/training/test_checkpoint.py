"""Checkpoints: committed or absent, detected when damaged, retained, never lost to a full disk."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from triptych.training import checkpoint, store
from triptych.training.checkpoint import Checkpointer
from triptych.training.shards import Window


def rows(value: float, rank: int = 0, size: int = 1, count: int = 8) -> Window:
    """This rank's rows of a (count, 3) tensor whose elements are value + their linear index."""
    whole = torch.arange(count * 3, dtype=torch.float64).reshape(count, 3) + value
    step = count // size
    return Window("model/w", whole[rank * step : (rank + 1) * step], (count, 3), (rank * step, 0))


def read(directory: Path, count: int = 8) -> torch.Tensor:
    whole = torch.empty(count, 3, dtype=torch.float64)
    with store.open_reader(directory) as reader:
        reader.read_into(Window("model/w", whole, (count, 3), (0, 0)))
    return whole


def save_steps(root: Path, steps: list[int], keep: int = 3) -> Checkpointer:
    checkpointer = Checkpointer(root, keep=keep)
    for step in steps:
        checkpointer.save(step, [rows(step)], {"step": step})
    checkpointer.wait()
    return checkpointer


def test_saves_points_and_retains(tmp_path: Path) -> None:
    save_steps(tmp_path, [10, 20, 30], keep=2)
    assert [path.name for path in store.list_steps(tmp_path)] == ["step-00000030", "step-00000020"]
    assert (tmp_path / "latest").read_text() == "step-00000030"
    assert sorted(path.name for path in (tmp_path / "step-00000030").iterdir()) == [
        "COMMITTED",
        "index.json",
        "manifest.json",
        "rank-00000.safetensors",
        "state.json",
    ]
    newest = store.find_latest(tmp_path)
    assert newest is not None
    assert store.load_state(newest) == {"step": 30}
    assert torch.equal(read(newest), rows(30).tensor)


def test_values_are_those_of_the_call_not_of_the_writing(tmp_path: Path) -> None:
    shard = rows(0)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, [shard], {})
    shard.tensor.zero_()
    checkpointer.wait()
    assert torch.equal(read(tmp_path / "step-00000001"), rows(0).tensor)


def test_retention_spares_what_latest_names(tmp_path: Path) -> None:
    save_steps(tmp_path, [10, 20, 30])
    (tmp_path / "latest").write_text("step-00000010")
    store.retain(tmp_path, 1)
    assert [path.name for path in store.list_steps(tmp_path)] == ["step-00000030", "step-00000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = save_steps(tmp_path, [10])
    checkpointer.save(10, [rows(7)], {"step": 10})
    checkpointer.wait()
    assert torch.equal(read(tmp_path / "step-00000010"), rows(7).tensor)
    assert store.problem(tmp_path / "step-00000010") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("flipped byte", lambda d: flip(d / "rank-00000.safetensors"), "rank-00000.safetensors does not match"),
    ("flipped state", lambda d: flip(d / "state.json"), "state.json does not match its checksum"),
    ("flipped manifest", lambda d: flip(d / "manifest.json"), "manifest.json differs"),
    ("missing file", lambda d: (d / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
    ("missing index", lambda d: (d / "index.json").unlink(), "index.json is missing"),
    ("missing manifest", lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    ("missing marker", lambda d: (d / "COMMITTED").unlink(), "COMMITTED is missing"),
    ("truncated", lambda d: os.truncate(d / "rank-00000.safetensors", 100), "has 100 bytes instead of"),
]


@pytest.mark.parametrize(("damage", "words"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], words: str
) -> None:
    save_steps(tmp_path, [10, 20])
    damage(tmp_path / "step-00000020")
    assert store.find_latest(tmp_path) == tmp_path / "step-00000010"
    assert "NOT USABLE" in caplog.text and "step-00000020" in caplog.text and words in caplog.text
    damage(tmp_path / "step-00000010")
    with pytest.raises(ValueError, match=r"no checkpoint is valid: .*step-00000020.*step-00000010.*PATH"):
        store.find_latest(tmp_path)


def test_no_checkpoint_at_all_is_no_error(tmp_path: Path) -> None:
    assert store.find_latest(tmp_path / "absent") is None
    (tmp_path / ".tmp-step-00000010-abcd").mkdir()
    assert store.find_latest(tmp_path) is None
    Checkpointer(tmp_path)
    assert not list(tmp_path.iterdir())


def test_set_aside_keeps_the_files(tmp_path: Path) -> None:
    save_steps(tmp_path, [10])
    for expected in ("step-00000010.corrupt", "step-00000010.corrupt.1"):
        save_steps(tmp_path, [10])
        assert store.set_aside(tmp_path / "step-00000010", "corrupt").name == expected
        assert (tmp_path / expected / "COMMITTED").is_file()
    assert store.list_steps(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_full_disk_keeps_the_run_and_the_old_checkpoint(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = small_disk / "checkpoints"
    checkpointer = Checkpointer(root)
    checkpointer.save(10, [rows(10)], {"step": 10})
    # 40000 rows of 3 doubles are 960 kB.
    checkpointer.save(20, [rows(20, count=40000)], {"step": 20})
    checkpointer.wait()
    assert checkpointer.failures == 1
    assert "step 20 was NOT saved" in caplog.text and "No space left on device" in caplog.text
    assert "step-00000010" in caplog.text
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000010"]
    checkpointer.save(30, [rows(30)], {"step": 30})
    checkpointer.wait()
    assert store.find_latest(root) == root / "step-00000030"


def full_after(name: str) -> Callable[..., Any]:
    """store.write_text on a disk that is full when file `name` comes."""
    real = store.write_text

    def write_text(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        real(path, text)

    return write_text


@pytest.mark.parametrize("name", ["part-00000.json", "index.json", "manifest.json", "COMMITTED"])
def test_full_disk_at_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    checkpointer = save_steps(tmp_path, [10])
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_text", full_after(name))
        checkpointer.save(20, [rows(20)], {})
        checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]
    assert store.find_latest(tmp_path) == tmp_path / "step-00000010"


def test_a_defect_in_the_background_is_raised(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, [Window("model/w", torch.zeros(2, 3), (4, 3), (0, 0))], {})
    with pytest.raises(RuntimeError, match="6 of 12 elements"):
        checkpointer.wait()
    assert store.list_steps(tmp_path) == []


def save_as_group(root: Path, full_ranks: tuple[int, ...], silent: bool) -> tuple[int, str]:
    """Two saves by all ranks, of which the second meets a full disk on some; failures and warnings."""
    rank, size = dist.get_rank(), dist.get_world_size()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.log.addHandler(handler)
    checkpointer = Checkpointer(root)
    checkpointer.save(10, [rows(10, rank, size)], {"step": 10})
    checkpointer.wait()
    real_write, real_text = checkpoint.write_file, store.write_text
    if rank in full_ranks:

        def full(path: Path, *_: object) -> Any:
            raise OSError(28, "No space left on device", str(path))

        checkpoint.write_file = full
        if silent:
            store.write_text = full
    checkpointer.save(20, [rows(20, rank, size)], {"step": 20})
    checkpointer.wait()
    checkpoint.write_file, store.write_text = real_write, real_text
    checkpointer.save(30, [rows(30, rank, size)], {"step": 30})
    checkpointer.wait()
    return checkpointer.failures, "\n".join(records)


@pytest.mark.parametrize("silent", [False, True], ids=["leaves a note", "cannot even leave a note"])
def test_full_disk_on_one_rank(tmp_path: Path, distributed: Callable[..., list[Any]], silent: bool) -> None:
    outcomes = distributed(4, save_as_group, tmp_path, (2,), silent)
    assert [failures for failures, _ in outcomes] == [1, 1, 1, 1]
    assert "step 20 was NOT saved" in outcomes[0][1]
    if not silent:
        assert "rank 2: [Errno 28] No space left on device" in outcomes[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000030"]
    assert torch.equal(read(tmp_path / "step-00000030"), rows(30).tensor)
    assert sorted(path.name for path in (tmp_path / "step-00000030").glob("*.safetensors")) == [
        f"rank-{rank:05d}.safetensors" for rank in range(4)
    ]


def die_while_saving(root: Path, victim: int) -> None:
    """Save step 10, then `victim` is killed while its part of step 20 is being written."""
    rank, size = dist.get_rank(), dist.get_world_size()
    checkpointer = Checkpointer(root)
    checkpointer.save(10, [rows(10, rank, size)], {"step": 10})
    checkpointer.wait()
    if rank == victim:
        real = checkpoint.write_file

        def killed(path: Path, tensors: dict[str, torch.Tensor]) -> str:
            real(path, tensors)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        checkpoint.write_file = killed
    checkpointer.save(20, [rows(20, rank, size)], {"step": 20})
    checkpointer.close(grace=1.0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_saving_commits_nothing(
    tmp_path: Path, distributed: Callable[..., list[Any]], victim: int
) -> None:
    with pytest.raises(RuntimeError):
        distributed(2, die_while_saving, tmp_path, victim)
    assert store.find_latest(tmp_path) == tmp_path / "step-00000010"
    Checkpointer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]


def die_while_committing(root: Path, name: str, after: bool) -> None:
    """Save step 10, then be killed before or after file `name` of step 20 is written."""
    save_steps(root, [10])
    real = store.write_text

    def killed(path: Path, text: str) -> None:
        if after or path.name != name:
            real(path, text)
        if path.name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    store.write_text = killed
    checkpointer = Checkpointer(root)
    checkpointer.save(20, [rows(20)], {"step": 20})
    checkpointer.wait()


@pytest.mark.parametrize(
    ("name", "after", "newest"),
    [
        ("COMMITTED", False, "step-00000010"),
        ("COMMITTED", True, "step-00000010"),
        ("latest", False, "step-00000020"),
    ],
)
def test_a_kill_while_committing_leaves_one_or_the_other(
    tmp_path: Path, distributed: Callable[..., list[Any]], name: str, after: bool, newest: str
) -> None:
    with pytest.raises(RuntimeError):
        distributed(1, die_while_committing, tmp_path, name, after)
    found = store.find_latest(tmp_path)
    assert found == tmp_path / newest
    assert torch.equal(read(found), rows(float(newest[-2:])).tensor)
    save_steps(tmp_path, [30])
    assert not list(tmp_path.glob(".*"))


def find_as_group(root: Path) -> str:
    from triptych.training.group import Group

    return str(store.find_latest(root, Group()))


def test_ranks_share_the_reading_and_agree(tmp_path: Path, distributed: Callable[..., list[Any]]) -> None:
    save_steps(tmp_path, [10, 20])
    for name in ("index.json", "rank-00000.safetensors", "state.json"):
        flip(tmp_path / "step-00000020" / name)
        assert distributed(3, find_as_group, tmp_path) == [str(tmp_path / "step-00000010")] * 3
        flip(tmp_path / "step-00000020" / name)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Event(), threading.Event()
    real = checkpoint.write_file

    def slow(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        entered.set()
        release.wait(10)
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_file", slow)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, [rows(1)], {})
    assert entered.wait(10)
    assert store.list_steps(tmp_path) == []
    threading.Timer(0.2, release.set).start()
    checkpointer.save(2, [rows(2)], {})
    assert [path.name for path in store.list_steps(tmp_path)][-1] == "step-00000001"
    checkpointer.wait()
