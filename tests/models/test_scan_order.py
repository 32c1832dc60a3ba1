"""Scan orders: small ones by hand, ZigMa's eight by their definition, and the properties of all of them."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.models.scan_order import inverse, line_ends, scan_order

MODIFIERS = ["", "+reverse", "+flip_w", "+flip:0", "+flip:0+reverse"]
SHAPES = {1: st.tuples(st.integers(1, 40)), 2: st.tuples(*[st.integers(1, 13)] * 2)}
SHAPES[3] = st.tuples(*[st.integers(1, 7)] * 3)
ANY_SHAPE = st.one_of(*SHAPES.values())


def bases_of(axes: int) -> list[str]:
    names = ["raster", "column", "snake", "hilbert", "window:1", "window:3", "window:4"]
    names += ["multiscale:1", "multiscale:2", "multiscale:9"]
    names += [f"axis:{k}" for k in range(axes)]
    return names + [f"zigzag:{i}" for i in range(math.factorial(axes) * 2**axes)]


@st.composite
def ordered_grids(draw, shapes=ANY_SHAPE, modifiers=MODIFIERS):
    shape = draw(shapes)
    base = draw(st.sampled_from(bases_of(len(shape))))
    return base + draw(st.sampled_from(modifiers)), shape


def visits(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """(T, n): coordinates in the order of visits."""
    return torch.stack(torch.unravel_index(scan_order(name, shape), shape), dim=1)


def step_sizes(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """(T - 1,): the sum of the coordinates' changes in each step."""
    return visits(name, shape).diff(dim=0).abs().sum(1)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("raster", [[0, 1, 2], [3, 4, 5]]),
        ("raster+flip_w", [[2, 1, 0], [5, 4, 3]]),
        ("raster+flip_h", [[3, 4, 5], [0, 1, 2]]),
        ("raster+flip:0", [[3, 4, 5], [0, 1, 2]]),
        ("raster+reverse", [[5, 4, 3], [2, 1, 0]]),
        ("column", [[0, 2, 4], [1, 3, 5]]),
        ("axis:0", [[0, 2, 4], [1, 3, 5]]),
        ("axis:1", [[0, 1, 2], [3, 4, 5]]),
        ("column+flip_h", [[1, 3, 5], [0, 2, 4]]),
        ("snake", [[0, 1, 2], [5, 4, 3]]),
        ("zigzag", [[0, 1, 2], [5, 4, 3]]),
        ("zigzag:1", [[0, 3, 4], [1, 2, 5]]),
        ("window:2", [[0, 1, 4], [2, 3, 5]]),
        ("hilbert", [[0, 1, 2], [5, 4, 3]]),
        ("multiscale:1", [[0, 2, 1], [3, 4, 5]]),
    ],
)
def test_when_each_token_of_a_2_by_3_grid_is_visited(name, rows):
    assert inverse(scan_order(name, (2, 3))).view(2, 3).tolist() == rows


def test_multiscale_of_a_row_and_hilbert_of_the_smallest_squares():
    assert scan_order("multiscale:2", (9,)).tolist() == [0, 4, 8, 2, 6, 1, 3, 5, 7]
    assert scan_order("hilbert", (5,)).tolist() == [0, 1, 2, 3, 4]
    # First-order curve, then the second order of four of them, the first and last turned.
    assert inverse(scan_order("hilbert", (2, 2))).view(2, 2).tolist() == [[0, 1], [3, 2]]
    assert inverse(scan_order("hilbert", (4, 4))).view(4, 4).tolist() == [
        [0, 3, 4, 5],
        [1, 2, 7, 6],
        [14, 13, 8, 9],
        [15, 12, 11, 10],
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_zigzags_of_a_square_are_those_of_zigma_under_its_numbers(size):
    """From each corner, first row by row and then column by column, turning at every line's end."""
    expected = []
    for bottom, right in itertools.product([False, True], repeat=2):
        for by_column in (False, True):
            path = []
            for line in range(size):
                for place in range(size) if line % 2 == 0 else reversed(range(size)):
                    row, column = (place, line) if by_column else (line, place)
                    row, column = (
                        (size - 1 - row if bottom else row),
                        (size - 1 - column if right else column),
                    )
                    path.append(row * size + column)
            expected.append(path)
    assert [scan_order(f"zigzag:{i}", (size, size)).tolist() for i in range(8)] == expected


@settings(deadline=None, max_examples=200)
@given(ordered_grids())
def test_an_order_is_a_permutation_and_its_inverse_is_exact(case):
    name, shape = case
    order = scan_order(name, shape)
    tokens = torch.arange(math.prod(shape))
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, tokens)
    assert torch.equal(inverse(order)[order], tokens)
    assert torch.equal(order[inverse(order)], tokens)


@settings(deadline=None, max_examples=100)
@given(ordered_grids())
def test_modifiers_undo_themselves_and_mirror_what_is_visited(case):
    name, shape = case
    order = scan_order(name, shape)
    assert torch.equal(scan_order(name + "+reverse", shape), order.flip(0))
    assert torch.equal(scan_order(name + "+reverse+reverse", shape), order)
    for axis in range(len(shape)):
        flip = f"+flip:{axis}"
        assert torch.equal(scan_order(name + flip + flip, shape), order)
        mirrored = visits(name, shape)
        mirrored[:, axis] = shape[axis] - 1 - mirrored[:, axis]
        assert torch.equal(visits(name + flip, shape), mirrored)
    assert torch.equal(
        scan_order(name + "+flip_w", shape), scan_order(f"{name}+flip:{len(shape) - 1}", shape)
    )
    if len(shape) > 1:
        above = f"{name}+flip:{len(shape) - 2}"
        assert torch.equal(scan_order(name + "+flip_h", shape), scan_order(above, shape))


@settings(deadline=None, max_examples=100)
@given(ANY_SHAPE, st.data())
def test_zigzags_move_by_unit_steps_and_are_all_different(shape, data):
    count = math.factorial(len(shape)) * 2 ** len(shape)
    number = data.draw(st.integers(0, count - 1))
    assert (step_sizes(f"zigzag:{number}", shape) == 1).all()
    if min(shape) > 1:
        paths = {tuple(scan_order(f"zigzag:{i}", shape).tolist()) for i in range(count)}
        assert len(paths) == count


@settings(deadline=None, max_examples=150)
@given(SHAPES[1] | SHAPES[2] | st.tuples(*[st.sampled_from([1, 2, 4, 6, 8])] * 3) | SHAPES[3])
def test_hilbert_begins_at_the_origin_and_moves_by_unit_steps_where_promised(shape):
    steps = step_sizes("hilbert", shape)
    assert scan_order("hilbert", shape)[0] == 0
    if len(shape) < 3 or min(shape) == 1 or all(side % 2 == 0 for side in shape):
        assert (steps == 1).all()
    else:
        # The odd boxes: few steps, and those to a diagonal neighbour.
        assert steps.max() <= 2 and visits("hilbert", shape).diff(dim=0).abs().max() == 1
        assert int((steps == 2).sum()) * 13 < math.prod(shape)


def test_hilbert_curve_of_odd_boxes_does_step_diagonally():
    """What the docstring says it cannot promise."""
    assert (step_sizes("hilbert", (3, 3, 3)) == 2).any()


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 4), ((16, 16, 16), 4), ((30, 42), 6)])
def test_hilbert_keeps_neighbours_nearer_than_raster(shape, size):
    """Runs of size^n visits fit into a smaller box than raster's lines."""

    def extent(name: str) -> float:
        runs = visits(name, shape).unfold(0, size ** len(shape), size ** len(shape))
        return float((runs.amax(-1) - runs.amin(-1)).amax(-1).double().mean())

    assert extent("hilbert") < 2 * size < extent("raster")


@settings(deadline=None, max_examples=60)
@given(ANY_SHAPE)
def test_column_is_raster_of_the_transposed_grid(shape):
    tokens = torch.arange(math.prod(shape)).view(shape)
    turned = tokens.permute(*reversed(range(len(shape)))).flatten()
    assert torch.equal(scan_order("column", shape), turned[scan_order("raster", shape[::-1])])
    assert torch.equal(scan_order(f"axis:{len(shape) - 1}", shape), scan_order("raster", shape))


@settings(deadline=None, max_examples=60)
@given(ANY_SHAPE, st.data())
def test_an_axis_scan_moves_along_its_axis_until_the_line_ends(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    lines = visits(f"axis:{axis}", shape).view(-1, shape[axis], len(shape))
    assert torch.equal(lines[:, :, axis], torch.arange(shape[axis]).expand(lines.shape[:2]))
    others = [k for k in range(len(shape)) if k != axis]
    assert (lines[:, :, others] == lines[:, :1, others]).all()
    first = lines[:, 0, others].tolist()
    assert first == sorted(first)


@settings(deadline=None, max_examples=80)
@given(ANY_SHAPE, st.integers(1, 5))
def test_windows_are_visited_one_after_the_other_each_in_raster_order(shape, size):
    windows = visits(f"window:{size}", shape).div(size, rounding_mode="floor").tolist()
    blocks = [(block, len(list(run))) for block, run in itertools.groupby(windows)]
    assert [block for block, _ in blocks] == sorted(block for block, _ in blocks)
    assert len({tuple(block) for block, _ in blocks}) == len(blocks)
    places = visits(f"window:{size}", shape).tolist()
    start = 0
    for _, length in blocks:
        assert places[start : start + length] == sorted(places[start : start + length])
        start += length


@settings(deadline=None, max_examples=80)
@given(ANY_SHAPE, st.integers(1, 4))
def test_multiscale_visits_each_lattice_whole_before_the_next_finer_one(shape, levels):
    places = visits(f"multiscale:{levels}", shape)
    start = 0
    for level in reversed(range(levels + 1)):
        size = math.prod(-(-side // 2**level) for side in shape)
        lattice = places[:size]
        assert (lattice % 2**level == 0).all()
        assert places[start:size].tolist() == sorted(places[start:size].tolist())
        start = size
    assert start == len(places)


@settings(deadline=None, max_examples=100)
@given(ordered_grids())
def test_lines_end_where_the_next_token_is_in_another_line(case):
    name, shape = case
    word = name.split("+")[0].split(":")[0]
    if word not in ("raster", "column", "axis", "zigzag", "snake"):
        with pytest.raises(ValueError, match=r"has no lines that end.*raster, column, axis:k"):
            line_ends(name, shape)
        return
    places, ends = visits(name, shape), line_ends(name, shape)
    # A line is where one coordinate alone changes, over the whole side.
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1] + 1])
    assert ends[-1] == len(places) - 1
    for start, end in zip(starts.tolist(), ends.tolist()):
        line = places[start : end + 1]
        moving = [axis for axis in range(len(shape)) if line[:, axis].unique().numel() > 1]
        assert len(moving) <= 1
        if moving:
            assert line[:, moving[0]].sort().values.tolist() == list(range(shape[moving[0]]))


def test_line_ends_by_hand():
    assert line_ends("raster", (2, 3)).tolist() == [2, 5]
    assert line_ends("column+reverse", (2, 3)).tolist() == [1, 3, 5]
    assert line_ends("zigzag:1", (2, 3)).tolist() == [1, 3, 5]
    assert line_ends("axis:1", (2, 3, 4)).tolist() == [2, 5, 8, 11, 14, 17, 20, 23]
    assert line_ends("raster", (7,)).tolist() == [6]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("hilbrt", (4, 4), "order 'hilbrt' is unknown; did you mean 'hilbert'.*use one of raster, column"),
        ("spiral", (4, 4), r"'spiral' is unknown; use one of raster.*multiscale:S, with \+reverse"),
        ("", (4, 4), "order '' is unknown"),
        ("raster+revers", (4, 4), "modifier 'revers' is unknown; did you mean 'reverse'"),
        ("raster+reverse:1", (4, 4), "modifier 'reverse:1' is unknown"),
        ("raster+flip_w:1", (4, 4), "modifier 'flip_w:1' is unknown"),
        ("raster:2", (4, 4), "raster takes no number"),
        ("snake:2", (4, 4), "snake takes no number"),
        ("window", (4, 4), "needs a whole number of at least 1"),
        ("window:0", (4, 4), "needs a whole number of at least 1"),
        ("window:-2", (4, 4), "needs a whole number of at least 1"),
        ("multiscale:x", (4, 4), "needs a whole number of at least 1"),
        ("axis", (4, 4), "needs a whole number of at least 0"),
        ("axis:2", (4, 4), "a grid of 2 sides has axis:0 to axis:1"),
        ("zigzag:8", (4, 4), "a grid of 2 sides has zigzag:0 to zigzag:7"),
        ("zigzag:2", (4,), "a grid of 1 sides has zigzag:0 to zigzag:1"),
        ("raster+flip", (4, 4), "needs a whole number of at least 0"),
        ("raster+flip:2", (4, 4), r"a grid of 2 sides has no axis for \+flip:2"),
        ("raster+flip_h", (4,), r"a grid of 1 sides has no axis for \+flip_h"),
        ("raster", (4, 0), r"1 to 3 sides of at least 1 token, not \(4, 0\)"),
        ("raster", (), r"1 to 3 sides of at least 1 token, not \(\)"),
        ("hilbert", (2, 2, 2, 2), "1 to 3 sides"),
    ],
)
def test_what_is_no_order_is_refused_by_name(name, shape, words):
    with pytest.raises(ValueError, match=words):
        scan_order(name, shape)
    with pytest.raises(ValueError, match=words):
        line_ends(name, shape)


def test_orders_are_made_once_and_cannot_be_spoilt():
    first = scan_order("hilbert", (64, 64))
    first.fill_(0)
    start = time.perf_counter()
    again = scan_order("hilbert", (64, 64))
    assert time.perf_counter() - start < 0.05
    assert again[-1] != 0 and torch.equal(again.sort().values, torch.arange(64 * 64))


def test_numbers_larger_than_the_grid_mean_all_of_it():
    assert torch.equal(scan_order(f"window:{10**30}", (3, 5)), scan_order("raster", (3, 5)))
    assert torch.equal(scan_order(f"multiscale:{10**9}", (3, 5)), scan_order("multiscale:3", (3, 5)))


def test_orders_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert scan_order("zigzag:5", (3, 4)).device.type == "cpu"
        assert line_ends("zigzag:5", (3, 4)).device.type == "cpu"
