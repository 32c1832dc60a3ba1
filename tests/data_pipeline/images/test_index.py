"""Indexes of shards: what is found in a tar file, and that an index never outlives its shard."""

from __future__ import annotations

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data_pipeline.images import index as module
from triptych.data_pipeline.images.index import (
    BAD_LABEL,
    NO_LABEL,
    UNREADABLE,
    build_index,
    load_index,
    parse_label,
)
from triptych.data_pipeline.images.shards import Shards, find_shards

from .samples import image, npy, png, write_shards, write_tar


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.npz")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_the_index_says(tmp_path: Path, form: int) -> None:
    """Against tarfile's own reader; long names take headers of their own."""
    long = "directory/" * 8 + "é" + "x" * 60 if form != tarfile.USTAR_FORMAT else "directory/x"
    members = {
        f"{long}.png": png(np.zeros((3, 5))),
        f"{long}.cls": b"7\n",
        "b.JPG": png(np.zeros((6, 2, 3)), "JPEG"),
        "b.json": json.dumps({"label": 3, "caption": "a cat"}).encode(),
        "b.text.npy": npy(np.zeros((5, 8), np.float16)),
        "c.webp": png(np.zeros((9, 4, 3)), "WEBP"),
        "c.mean.npy": npy(np.zeros((4, 2, 3), np.float32)),
        "c.std.npy": npy(np.zeros((4, 2, 3), np.float32)),
        "__meta__/info.txt": b"no sample",
        "README": b"no sample either",
    }
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder"))
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = build_index(path)
    assert found.faults == () and [key.decode() for key in found.keys] == [long, "b", "c"]
    assert found.images.tolist() == [[3, 5], [6, 2], [9, 4]]
    assert found.labels.tolist() == [7, 3, NO_LABEL]
    assert found.latents.tolist() == [[0, 0, 0], [0, 0, 0], [4, 2, 3]]
    assert found.texts.tolist() == [[0, 0], [5, 8], [0, 0]]
    shards = Shards([path])
    for n, key in enumerate([long, "b", "c"]):
        expected = {
            name.split(".", 1)[1].lower(): data
            for name, data in members.items()
            if name.startswith(f"{key}.")
        }
        assert shards.read(n) == expected


def test_an_index_file_is_used_until_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0.png", png(np.zeros((2, 2)))), ("0.cls", b"1")])
    first = load_index(shard)
    built = []
    monkeypatch.setattr(module, "build_index", lambda path: built.append(path) or build_index(path))
    again = load_index(shard)
    assert not built
    for name in ("keys", "offsets", "sizes", "labels", "images", "latents", "texts"):
        assert np.array_equal(getattr(again, name), getattr(first, name))
    assert (again.suffixes, again.faults) == (first.suffixes, first.faults)
    # The same size, another content: the time of change tells.
    status = shard.stat()
    write_tar(shard, [("0.png", png(np.zeros((2, 2)))), ("0.cls", b"4")])
    assert shard.stat().st_size == status.st_size
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load_index(shard).labels.tolist() == [4] and len(built) == 1
    # The same time, another size.
    write_tar(shard, [(f"{n}.cls", b"5") for n in range(40)])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(load_index(shard)) == 40 and len(built) == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tar"] == ["a.tar.index.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", b"\x93NUMPY"])
def test_a_damaged_index_file_is_made_again(tmp_path: Path, content: bytes) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0.cls", b"1")])
    index_path(shard).write_bytes(content)
    assert load_index(shard).labels.tolist() == [1]
    with np.load(index_path(shard), allow_pickle=False) as made:
        assert made["labels"].tolist() == [1]


def test_an_index_file_is_never_unpickled(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0.cls", b"1")])

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(index_path(shard), head=np.array([Trap()], dtype=object))
    assert load_index(shard).labels.tolist() == [1] and not (tmp_path / "sprung").exists()


def test_where_nothing_can_be_written_the_index_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0.cls", b"1")])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", refuse)
    with caplog.at_level("INFO", "triptych"):
        assert load_index(shard).labels.tolist() == [1]
    assert not index_path(shard).exists() and "kept in memory only" in caplog.text


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 30 * 512))
def test_a_truncated_shard_serves_what_is_before_the_tear(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    directory = tmp_path_factory.mktemp("torn")
    whole = Path(write_shards(directory, [image(n) for n in range(6)], per_shard=6)) / "part-000.tar"
    expected = Shards([whole])
    data = whole.read_bytes()
    torn = directory / "torn.tar"
    torn.write_bytes(data[:cut])
    found = Shards([torn])
    # Each sample is two members of a header and a block.
    complete = sum(cut >= 2048 * n + 1536 + len(expected.read(n)["cls"]) for n in range(6))
    assert complete <= len(found) <= complete + 1
    for n in range(complete):
        assert found.read(n) == expected.read(n)
    ends_well = cut >= 6 * 2048 + 512
    assert bool(found.faults) != ends_well
    if not ends_well and cut > 512:
        assert "truncated" in found.faults[0][1]


def test_what_is_no_tar_or_damaged_in_its_middle(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(b"no tar at all, but long enough for a header" * 50)
    assert "is no tar file" in build_index(tmp_path / "text.tar").faults[0]
    (tmp_path / "empty.tar").write_bytes(b"")
    assert len(build_index(tmp_path / "empty.tar").faults) == 1
    shard = Path(write_shards(tmp_path / "shards", [image(n) for n in range(4)])) / "part-000.tar"
    data = bytearray(shard.read_bytes())
    data[2 * 2048 : 2 * 2048 + 512] = b"?" * 512
    shard.write_bytes(data)
    found = build_index(shard)
    assert len(found) == 2 and found.faults == ("is damaged at byte 4096; what is whole before it is used",)
    # No samples, but whole: nothing is wrong with it.
    assert build_index(write_tar(tmp_path / "none.tar", [("README", b"")])).faults == ()


def test_a_member_that_comes_twice(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0.cls", b"1"), ("0.cls", b"2"), ("1.cls", b"3")])
    found = build_index(shard)
    assert found.labels.tolist() == [1, 3] and found.faults == ("has 0.cls twice; the first is used",)


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"cls": b" 12\n"}, 12),
        ({"cls": b"cat"}, BAD_LABEL),
        ({"cls": b"-1"}, BAD_LABEL),
        ({"cls": b""}, BAD_LABEL),
        ({"cls": "٣".encode()}, BAD_LABEL),
        ({"cls": b"99999999999999999999"}, BAD_LABEL),
        ({"json": b'{"label": 4}'}, 4),
        ({"json": b'{"caption": "a cat"}'}, NO_LABEL),
        ({"json": b'{"label": "4"}'}, BAD_LABEL),
        ({"json": b'{"label": true}'}, BAD_LABEL),
        ({"json": b'{"label": 1.0}'}, BAD_LABEL),
        ({"json": b'{"label": -1}'}, BAD_LABEL),
        ({"json": b"[1]"}, BAD_LABEL),
        ({"json": b"{torn"}, BAD_LABEL),
        ({"json": b"[" * 100000}, BAD_LABEL),
        ({"txt": b"a cat"}, NO_LABEL),
    ],
)
def test_labels(members: dict[str, bytes], label: int) -> None:
    assert parse_label(members) == label


def test_headers_that_say_nothing(tmp_path: Path) -> None:
    members = [
        ("0.png", b"\x89PNG torn"),
        ("1.mean.npy", npy(np.zeros((2, 2)))),
        ("2.mean.npy", npy(np.zeros((2, 2, 2), np.int32))),
        ("3.mean.npy", b"\x93NUMPY\x01"),
        ("4.text.npy", b"no array"),
    ]
    found = build_index(write_tar(tmp_path / "a.tar", members))
    assert found.images[0].tolist() == [UNREADABLE] * 2
    assert (found.latents[1:4] == UNREADABLE).all() and (found.texts[4] == UNREADABLE).all()


def test_a_header_longer_than_what_is_read_first(tmp_path: Path) -> None:
    """A JPEG whose profile fills more than the first 64 KB."""
    data = png(np.zeros((5, 7, 3)), "JPEG", icc_profile=bytes(200_000))
    found = build_index(write_tar(tmp_path / "a.tar", [("0.jpg", data)]))
    assert found.images.tolist() == [[5, 7]]


def test_finding_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", [image(n) for n in range(12)])
    names = [f"part-{n:03d}.tar" for n in range(3)]
    assert [path.name for path in find_shards(str(tmp_path / "a"))] == names
    assert [path.name for path in find_shards(f"{tmp_path}/a/part-{{000..002}}.tar")] == names
    assert [path.name for path in find_shards(f"{tmp_path}/a/part-001.tar")] == names[1:2]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for path, match in {
        str(tmp_path / "empty"): "is a directory without .tar files",
        f"{tmp_path}/a/part-{{000..004}}.tar": r"part-003.tar and 1 more is missing",
        f"{tmp_path}/a.tar.gz": "is no .tar file; shards are read at random",
        "https://example.org/{0..3}.tar": "is a URL; set data.stream: true",
        "pipe:cat a.tar": "is a URL; set data.stream: true",
        str(tmp_path / "{0..3"): "is missing|do not match",
    }.items():
        with pytest.raises(ValueError, match=match):
            find_shards(path)


def test_a_shard_that_shrinks_while_it_is_used(tmp_path: Path) -> None:
    shard = Path(write_shards(tmp_path, [image(n) for n in range(3)])) / "part-000.tar"
    shards = Shards([shard])
    assert shards.read(1) == image(1)
    os.truncate(shard, 3000)
    with pytest.raises(RuntimeError, match="has become shorter since it was indexed"):
        shards.read(2)


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.data_pipeline.images.shards._OPEN_FILES", 2)
    shards = Shards(find_shards(write_shards(tmp_path, [image(n) for n in range(20)], per_shard=4)))
    for n in np.random.default_rng(0).integers(0, 20, 60).tolist():
        assert shards.read(n) == image(n)
    assert len(shards._files) == 2 and shards.name(7) == f"{tmp_path}/part-001.tar:007"


def test_many_may_index_at_the_same_time(tmp_path: Path) -> None:
    """As the ranks of a run do on a shared file system."""
    shard = Path(write_shards(tmp_path, [image(n) for n in range(40)], per_shard=40)) / "part-000.tar"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_index(shard), range(16)))
    assert all(each.offsets.tolist() == found[0].offsets.tolist() for each in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000.tar", "part-000.tar.index.npz"]
