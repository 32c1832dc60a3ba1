"""Sharded tensors on disk: our writer against the safetensors library, and every grid against every other."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from triptych.training.shards import (
    Reader,
    Window,
    index_from_json,
    index_to_json,
    merge,
    part_index,
    write_file,
)

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (4, 3), (5, 2)]


def windows(name: str, whole: Tensor, grid: tuple[int, ...]) -> list[Window]:
    """`whole` cut like torch.chunk over each dimension: uneven, the last windows possibly empty."""
    cuts = []
    for size, count in zip(whole.shape, grid, strict=True):
        step = math.ceil(size / count)
        cuts.append([(min(i * step, size), min((i + 1) * step, size)) for i in range(count)])
    found = []
    for cut in itertools.product(*cuts):
        local = whole[tuple(slice(low, high) for low, high in cut)]
        found.append(Window(name, local, tuple(whole.shape), tuple(low for low, _ in cut)))
    return found


def save(directory: Path, tensors: dict[str, Tensor], grids: dict[str, tuple[int, ...]]) -> Reader:
    """Write `tensors` as the ranks of a grid would; the reader of what was written."""
    ranks: dict[int, list[Window]] = {}
    for name, whole in tensors.items():
        for rank, window in enumerate(windows(name, whole, grids[name])):
            if window.tensor.numel():
                ranks.setdefault(rank, []).append(window)
    parts = []
    for rank, held in ranks.items():
        file = f"rank-{rank:05d}.safetensors"
        write_file(directory / file, {window.name: window.tensor for window in held})
        parts.append(part_index(file, held))
    return Reader(directory, index_from_json(index_to_json(merge(parts))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_library_reads_our_files(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randn(5, 7).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "strided": torch.randn(6, 4).to(dtype).t(),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    write_file(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("written", GRIDS)
@pytest.mark.parametrize("read", GRIDS)
def test_any_grid_reads_any_other(tmp_path: Path, written: tuple[int, int], read: tuple[int, int]) -> None:
    tensors = {
        "matrix": torch.randn(7, 5, dtype=torch.float64),
        "vector": torch.randn(9, dtype=torch.float64),
        "cube": torch.randn(4, 3, 2, dtype=torch.float64),
        "scalar": torch.randn((), dtype=torch.float64),
    }
    grids = {"matrix": written, "vector": written[:1], "cube": (*written, 1), "scalar": ()}
    grids_read = {"matrix": read, "vector": read[:1], "cube": (1, *read), "scalar": ()}
    with save(tmp_path, tensors, grids) as reader:
        for name, whole in tensors.items():
            wanted = torch.full_like(whole, math.nan)
            for window in windows(name, wanted, grids_read[name]):
                reader.read_into(window)
            assert torch.equal(wanted, whole), name


def test_reading_casts_and_names_what_does_not_fit(tmp_path: Path) -> None:
    whole = torch.randn(4, 2)
    with save(tmp_path, {"w": whole}, {"w": (2, 1)}) as reader:
        narrow = torch.empty(4, 2, dtype=torch.bfloat16)
        reader.read_into(Window("w", narrow, (4, 2), (0, 0)))
        assert torch.equal(narrow, whole.bfloat16())
        with pytest.raises(ValueError, match=r"has no tensor other"):
            reader.read_into(Window("other", narrow, (4, 2), (0, 0)))
        with pytest.raises(ValueError, match=r"w has shape \(4, 2\), the model wants \(4, 3\)"):
            reader.read_into(Window("w", torch.empty(4, 3), (4, 3), (0, 0)))


def test_an_element_without_exactly_one_writer_is_refused(tmp_path: Path) -> None:
    half = Window("w", torch.zeros(2, 3), (4, 3), (0, 0))
    with pytest.raises(AssertionError, match="6 of 12 elements"):
        merge([part_index("a", [half])])
    whole = Window("w", torch.zeros(4, 3), (4, 3), (0, 0))
    with pytest.raises(AssertionError, match="24 of 12 elements"):
        merge([part_index("a", [whole]), part_index("b", [whole])])
