"""Tokens in scan orders against loops over images and tokens, in float64, with gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.models.common import on_ranks, set_parameter, small_config, window_of
from triptych.models.context import Context, document_bounds
from triptych.models.diffusion_config import DiffusionConfig
from triptych.models.init import initialize
from triptych.models.mixers import Mamba2
from triptych.models.scan import Scan, arrange, scanned_length
from triptych.models.scan_order import line_ends, scan_order

ORDERS = ["raster", "column+reverse", "zigzag:3", "hilbert", "window:2", "multiscale:1+flip_w"]
WITH_LINES = ["raster", "column+reverse", "zigzag:3", "axis:0+flip_h"]
PAD = -1
"""Stands for the pad in the loops."""


def scan_by_hand(images, length: int, name: str, pads: bool, kept=None) -> list[tuple[int, int]]:
    """[(token or PAD, image)] of one row's scan; padding tokens have the image len(images)."""
    entries, start = [], 0
    for number, shape in enumerate(images):
        ends = line_ends(name, shape).tolist() if pads else []
        for position, token in enumerate(scan_order(name, shape).tolist()):
            entries.append((start + token, number))
            if position in ends:
                entries.append((PAD, number))
        start += math.prod(shape)
    entries += [(token, len(images)) for token in range(start, length)]
    if kept is not None:
        place = {token: i for i, token in enumerate(kept)}
        entries = [(t if t == PAD else place[t], i) for t, i in entries if t == PAD or t in place]
    return entries


def arranged_by_hand(scan: Scan, x, orders, pad) -> tuple[torch.Tensor, torch.Tensor]:
    """x (K B, N, C) and the images of its places (K B, N), rows of loops."""
    rows, ids = [], []
    for name, b in itertools.product(orders, range(x.shape[0])):
        images = scan.rows[b % len(scan.rows)]
        kept = None if scan.kept is None else scan.kept[b].tolist()
        entries = scan_by_hand(images, scan.length, name, pad is not None, kept)
        rows.append([pad if token == PAD else x[b, token] for token, _ in entries])
        ids.append([image for _, image in entries])
    longest = max(map(len, rows))
    x = torch.stack([torch.stack(row + [pad] * (longest - len(row))) for row in rows])
    return x, torch.tensor([row + row[-1:] * (longest - len(row)) for row in ids])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_kept(batch: int, length: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(length, generator=generator)[:count].sort().values for _ in range(batch)]
    )


def ids_of(rows, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sizes (B, G, 2) and document_ids (B, T) of rows of images."""
    most = max(map(len, rows))
    sizes = torch.tensor([[*map(list, row), *[[0, 0]] * (most - len(row))] for row in rows])
    ids = torch.full((len(rows), length), most)
    for b, row in enumerate(rows):
        start = 0
        for number, image in enumerate(row):
            ids[b, start : start + math.prod(image)] = number
            start += math.prod(image)
    return sizes, ids


PACKED = [[(3, 4), (2, 2)], [(1, 5), (4, 2), (2, 3)], [(5, 4)]]
PACKED_LENGTH = 21


def packed_scan() -> tuple[Scan, torch.Tensor]:
    sizes, ids = ids_of(PACKED, PACKED_LENGTH)
    cu_seqlens, _ = document_bounds(ids)
    return Scan.of_packed(sizes, ids), cu_seqlens


def check(scan: Scan, x: torch.Tensor, orders: tuple[str, ...], pad, cu_seqlens=None) -> None:
    """Against the loops: what is arranged, its documents, what is restored, and all gradients."""
    inputs = [x.requires_grad_()] + ([] if pad is None else [pad.requires_grad_()])
    found = scan.arrange(x, orders, pad=pad, cu_seqlens=cu_seqlens)
    expected, ids = arranged_by_hand(scan, x, orders, pad)
    assert torch.equal(found.x, expected)
    if cu_seqlens is None:
        assert found.cu_seqlens is None
    else:
        assert found.cu_seqlens.dtype == torch.int32
        assert found.cu_seqlens.tolist() == document_bounds(ids)[0].tolist()
    weights = random(*expected.shape, seed=1)
    for ours, theirs in zip(
        torch.autograd.grad((found.x * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    # The k-th order's output is multiplied by k + 1, so that the mean is of different things.
    y = random(*expected.shape[:2], 3, seed=2).requires_grad_()
    restored = found.restore(y)
    B = x.shape[0]
    mean = torch.zeros(*x.shape[:2], 3, dtype=y.dtype)
    for (k, name), b in itertools.product(enumerate(orders), range(B)):
        kept = None if scan.kept is None else scan.kept[b].tolist()
        entries = scan_by_hand(scan.rows[b % len(scan.rows)], scan.length, name, pad is not None, kept)
        for place, (token, _) in enumerate(entries):
            if token != PAD:
                mean[b, token] = mean[b, token] + y[k * B + b, place] / len(orders)
    torch.testing.assert_close(restored, mean, rtol=0, atol=1e-15)
    weights = random(*mean.shape, seed=3)
    (ours,) = torch.autograd.grad((restored * weights).sum(), y)
    (theirs,) = torch.autograd.grad((mean * weights).sum(), y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 4), (2, 3, 4)])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(
    "orders", [("raster",), ("column+reverse",), ("zigzag:1", "hilbert", "raster+flip_w")]
)
def test_grid_equals_loops(shape, orders, routed):
    scan, T = Scan.of_grid(shape, "cpu"), math.prod(shape)
    if routed:
        scan = scan.route(random_kept(2, T, T // 2))
    check(scan, random(2, scan.num_tokens, 3), orders, None)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(
    "orders", [("raster",), ("column",), ("zigzag:1", "raster+flip_w", "column+reverse")]
)
def test_pads_stand_at_line_ends_and_all_stay_under_routing(orders, routed):
    """2 rows and 5 columns: beside a scan by columns, one by rows has three pads at its end."""
    scan = Scan.of_grid((2, 5), "cpu")
    if routed:
        scan = scan.route(random_kept(3, 10, 4))
    check(scan, random(3, scan.num_tokens, 3), orders, random(3, seed=5))


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("orders", [("column",), ("raster",), ("zigzag:2", "raster+reverse")])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_rows_equal_loops(orders, padded, routed):
    scan, cu_seqlens = packed_scan()
    if routed:
        # Row 1 loses its second image as a whole.
        kept = random_kept(3, PACKED_LENGTH, 8, seed=3)
        kept[1] = torch.tensor([0, 2, 4, 13, 15, 17, 18, 20])
        scan = scan.route(kept)
        cu_seqlens, _ = document_bounds(scan.document_ids.gather(1, kept))
    check(scan, random(3, scan.num_tokens, 2), orders, random(2, seed=5) if padded else None, cu_seqlens)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_grid_any_orders_any_tokens_kept(data):
    shape = data.draw(st.one_of(st.tuples(st.integers(1, 20)), st.tuples(*[st.integers(1, 6)] * 2)))
    padded = data.draw(st.booleans())
    names = WITH_LINES if padded else ORDERS
    names = [name for name in names if len(shape) == 2 or not name.endswith(("flip_h", ":3"))]
    orders = tuple(data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))
    scan, T = Scan.of_grid(shape, "cpu"), math.prod(shape)
    if data.draw(st.booleans()):
        scan = scan.route(random_kept(2, T, data.draw(st.integers(1, T)), seed=T))
    check(scan, random(2, scan.num_tokens, 2), orders, random(2, seed=5) if padded else None)


def test_a_padded_scan_by_hand():
    x = torch.arange(6.0).view(1, 6, 1)
    found = Scan.of_grid((2, 3), "cpu").arrange(x, ("column", "raster"), pad=torch.tensor([9.0]))
    # Raster has two lines where column has three: its last pad stands behind everything.
    assert found.x.squeeze(-1).tolist() == [[0, 3, 9, 1, 4, 9, 2, 5, 9], [0, 1, 2, 9, 3, 4, 5, 9, 9]]
    assert found.restore(found.x).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_pads_take_the_type_of_the_tokens_and_keep_their_own_gradients_type():
    x, pad = random(2, 6, 3).bfloat16(), random(3, seed=1).float().requires_grad_()
    found = Scan.of_grid((2, 3), "cpu").arrange(x, ("column",), pad=pad)
    assert found.x.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(found.x.float().sum(), pad)
    assert gradient.dtype == torch.float32 and gradient.tolist() == [6.0] * 3


def test_routing_twice_keeps_what_is_kept_of_the_kept():
    once = Scan.of_grid((3, 4), "cpu").route(torch.tensor([[0, 2, 5, 7, 9, 11]]))
    twice = once.route(torch.tensor([[1, 2, 4]]))
    assert twice.kept.tolist() == [[2, 5, 9]]
    x = torch.tensor([[[2.0], [5.0], [9.0]]])
    assert twice.arrange(x, ("column",)).x.flatten().tolist() == [5, 9, 2]


def neighbour_by_hand(scan: Scan, x: torch.Tensor, offset) -> torch.Tensor:
    rows = []
    for b in range(x.shape[0]):
        kept = list(range(scan.length)) if scan.kept is None else scan.kept[b].tolist()
        where, start = {}, 0
        for number, shape in enumerate(scan.rows[b % len(scan.rows)]):
            for i, place in enumerate(itertools.product(*map(range, shape))):
                if start + i in kept:
                    where[number, place] = kept.index(start + i)
            start += math.prod(shape)
        place_of = {token: key for key, token in where.items()}
        row = []
        for token in range(len(kept)):
            key = place_of.get(token)
            near = key and where.get((key[0], tuple(p + o for p, o in zip(key[1], offset))))
            row.append(torch.zeros_like(x[b, 0]) if near is None else x[b, near])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(
    ("shape", "offset"),
    [
        ((6,), (1,)),
        ((6,), (-2,)),
        ((3, 4), (0, 1)),
        ((3, 4), (-1, 0)),
        ((3, 4), (1, -1)),
        ((3, 4), (5, 0)),
        ((2, 3, 2), (0, 1, -1)),
        (None, (0, -1)),
        (None, (1, 0)),
        (None, (0, 0)),
    ],
)
def test_neighbours_equal_loops(shape, offset, routed):
    scan = packed_scan()[0] if shape is None else Scan.of_grid(shape, "cpu")
    if routed:
        scan = scan.route(random_kept(3, scan.length, scan.length // 2))
    x = random(3, scan.num_tokens, 2).requires_grad_()
    found, expected = scan.neighbour(x, offset), neighbour_by_hand(scan, x, offset)
    assert torch.equal(found, expected)
    weights = random(*x.shape, seed=1)
    (ours,) = torch.autograd.grad((found * weights).sum(), x)
    # Far beyond the edge the loops make nothing but constants.
    theirs = torch.zeros_like(x)
    if expected.requires_grad:
        (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


def test_language_models_and_raster_pay_nothing():
    x = random(2, 6, 3)
    cu_seqlens = torch.tensor([0, 2, 6, 12], dtype=torch.int32)
    for context in (
        Context(cu_seqlens=cu_seqlens),
        Context(cu_seqlens=cu_seqlens, scan=Scan.of_grid((2, 3), "cpu")),
    ):
        found = arrange(x, context, ("raster",))
        assert found.x is x and found.cu_seqlens is cu_seqlens and found.restore(x) is x


def test_indices_are_made_once_per_pass():
    scan = Scan.of_grid((4, 4), "cpu")
    scan.arrange(random(1, 16, 2), ("hilbert",), pad=None)
    kept = dict(scan.cache)
    scan.arrange(random(3, 16, 5), ("hilbert",))
    scan.neighbour(random(3, 16, 5), (0, 1))
    again = dict(scan.cache)
    scan.neighbour(random(3, 16, 5), (0, -1))
    assert kept and all(again[key] is value for key, value in kept.items())
    assert scan.cache.keys() == again.keys()


def test_under_recomputation_gradients_are_the_same():
    scan = Scan.of_grid((3, 4), "cpu").route(random_kept(2, 12, 7))
    x, pad = random(2, 7, 3).requires_grad_(), random(3, seed=1).requires_grad_()

    def work(x, pad):
        found = scan.arrange(x.sin(), ("column", "zigzag:2"), pad=pad)
        return found.restore(found.x.cumsum(1).tanh()) + scan.neighbour(x, (1, 0)).exp()

    plain = torch.autograd.grad(work(x, pad).square().sum(), [x, pad])
    again = torch.autograd.grad(checkpoint(work, x, pad, use_reentrant=False).square().sum(), [x, pad])
    for ours, theirs in zip(again, plain):
        assert torch.equal(ours, theirs)
    assert torch.autograd.gradcheck(work, (x, pad))
    assert torch.autograd.gradgradcheck(work, (x, pad))


def test_on_the_meta_device_shapes_are_right():
    with torch.device("meta"):
        x, pad = torch.empty(2, 12, 5, requires_grad=True), torch.empty(5)
        scan = Scan.of_grid((3, 4), "meta")
        found = scan.arrange(x, ("column", "raster"), pad=pad)
        assert found.x.shape == (4, 16, 5) and found.x.is_meta
        found.restore(found.x).sum().backward()
        assert x.grad.shape == x.shape
        routed = scan.route(torch.empty(2, 6, dtype=torch.int64))
        assert routed.arrange(x[:, :6], ("column",), pad=pad).x.shape == (2, 10, 5)
        assert routed.neighbour(x[:, :6], (0, 1)).shape == (2, 6, 5)
        packed = Scan.of_packed(
            torch.empty(2, 3, 2, dtype=torch.int64), torch.empty(2, 12, dtype=torch.int64)
        )
        found = packed.arrange(x, ("column",))
        assert found.restore(found.x).shape == x.shape and packed.neighbour(x, (0, 1)).shape == x.shape


def test_what_does_not_fit_is_refused():
    scan = Scan.of_grid((3, 4), "cpu")
    with pytest.raises(ValueError, match=r"x is \(1, 11, 2\), but this pass has 12 tokens in each"):
        scan.arrange(random(1, 11, 2), ("column",))
    with pytest.raises(ValueError, match="this pass has 5 tokens"):
        scan.route(random_kept(2, 12, 5)).neighbour(random(2, 12, 2), (0, 1))
    with pytest.raises(ValueError, match="'colum' is unknown; did you mean 'column'"):
        scan.arrange(random(1, 12, 2), ("colum",))
    with pytest.raises(ValueError, match="'hilbert' has no lines"):
        scan.arrange(random(1, 12, 2), ("hilbert",), pad=random(2))
    with pytest.raises(ValueError, match=r"no neighbours at \(0, 0, 1\)"):
        scan.neighbour(random(1, 12, 2), (0, 0, 1))
    with pytest.raises(ValueError, match=r"images \[\(3, 4\), \(2, 2\)\] of row 1 do not fit into its 15"):
        Scan.of_packed(torch.tensor([[[3, 4], [0, 0]], [[3, 4], [2, 2]]]), torch.zeros(2, 15))
    with pytest.raises(ValueError, match="frobnicate needs images of one size"):
        packed_scan()[0].whole_grid("frobnicate")
    with pytest.raises(ValueError, match=r"frobnicate needs every token.*train\.tread leaves 6 of 12"):
        scan.route(random_kept(2, 12, 6)).subbands(1, "frobnicate")
    assert scan.whole_grid("frobnicate") == (3, 4)


def test_subbands_are_scanned_one_after_the_other():
    bands = Scan.of_grid((4, 6), "cpu").subbands(1, "a wavelet")
    x = torch.arange(24.0).view(1, 24, 1)
    column = [0, 3, 1, 4, 2, 5]
    expected = [6 * band + token for band in range(4) for token in column]
    assert bands.arrange(x, ("column",)).x.flatten().tolist() == expected


def diffusion_config(**scan) -> DiffusionConfig:
    return DiffusionConfig.model_validate(
        {
            "hidden_size": 24,
            "num_layers": 2,
            "pattern": "M",
            "in_channels": 3,
            "input_size": [6, 8],
            "mamba2": {"state_size": 5, "head_dim": 6, "num_groups": 2, "chunk_size": 8},
            "scan": scan,
        }
    )


def mamba2(layer: int = 0, **scan) -> Mamba2:
    mixer = Mamba2(diffusion_config(**scan), layer).double()
    initialize(mixer, 0)
    return mixer


def test_mamba2_scans_as_if_the_tokens_had_been_given_in_that_order():
    mixer = mamba2(1, orders=["raster", "zigzag:1+reverse"])
    assert mixer.orders == ("zigzag:1+reverse",) and mixer.pad_token is None
    x, order = random(2, 12, 24), scan_order("zigzag:1+reverse", (3, 4))
    found = mixer(x, Context(scan=Scan.of_grid((3, 4), "cpu")))
    expected = torch.empty_like(found)
    expected[:, order] = mixer(x[:, order], Context())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_mamba2_takes_the_mean_of_parallel_scans_and_reads_its_pads():
    mixer = mamba2(orders=["column", "raster+reverse"], merge="sum", line_ends=True)
    x, context = random(2, 12, 24), Context(scan=Scan.of_grid((3, 4), "cpu"))
    found, parts = mixer(x, context), []
    for name in mixer.orders:
        tokens = scan_by_hand([(3, 4)], 12, name, True)
        row = torch.stack([mixer.pad_token.expand(2, -1) if t == PAD else x[:, t] for t, _ in tokens], dim=1)
        y = mixer(row, Context())
        part = torch.zeros_like(x)
        for place, (token, _) in enumerate(tokens):
            if token != PAD:
                part[:, token] = y[:, place]
        parts.append(part)
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2, rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad(found.square().sum(), mixer.pad_token)
    (expected,) = torch.autograd.grad(((parts[0] + parts[1]) / 2).square().sum(), mixer.pad_token)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("line_ends", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_packed_images_equal_separate_ones(line_ends, routed):
    mixer = mamba2(orders=["column", "zigzag:2+reverse"], merge="sum", line_ends=line_ends)
    scan, cu_seqlens = packed_scan()
    x = random(3, PACKED_LENGTH, 24)
    kept = torch.arange(PACKED_LENGTH).expand(3, -1)
    if routed:
        kept = torch.tensor(
            [[1, 2, 6, 10, 13, 15, 17, 20], [0, 2, 4, 13, 15, 17, 18, 20], [*range(3, 10), 19]]
        )
        x, scan = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, 24)), scan.route(kept)
        cu_seqlens, _ = document_bounds(scan.document_ids.gather(1, kept))
    packed = mixer(x, Context(scan=scan, cu_seqlens=cu_seqlens))
    compared = 0
    for b, row in enumerate(PACKED):
        start = 0
        for image in row:
            inside = (kept[b] >= start) & (kept[b] < start + math.prod(image))
            if inside.any():
                alone = Scan.of_grid(image, "cpu").route((kept[b][inside] - start).unsqueeze(0))
                expected = mixer(x[b : b + 1, inside], Context(scan=alone))
                torch.testing.assert_close(packed[b : b + 1, inside], expected, rtol=0, atol=1e-12)
                compared += 1
            start += math.prod(image)
    assert compared == (5 if routed else 6)


def test_partial_sums_of_shards_and_of_the_pads_gradients_add_up():
    mixer = mamba2(orders=["column", "raster+reverse"], merge="sum", line_ends=True)
    x, weights = random(2, 12, 24), random(2, 12, 24, seed=1)
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}

    def shard(rank, group):
        local = mamba2(orders=["column", "raster+reverse"], merge="sum", line_ends=True)
        for name, value in parameters.items():
            set_parameter(local, name, value[window_of(mixer.sharding.get(name), value.shape, 2, rank)])
        y = local(x, Context(scan=Scan.of_grid((3, 4), "cpu")))
        return y.detach(), torch.autograd.grad((y * weights).sum(), local.pad_token)[0]

    y = mixer(x, Context(scan=Scan.of_grid((3, 4), "cpu")))
    (gradient,) = torch.autograd.grad((y * weights).sum(), mixer.pad_token)
    ys, gradients = zip(*on_ranks(2, shard))
    torch.testing.assert_close(sum(ys), y.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(gradients), gradient, rtol=1e-11, atol=1e-13)


def test_flops_count_every_place_that_is_scanned():
    """Against PyTorch's counter, on a chunk size that divides all lengths."""
    from torch.utils.flop_counter import FlopCounterMode

    for scan in ({"orders": ["column"]}, {"orders": ["column", "raster"], "merge": "sum", "line_ends": True}):
        config = diffusion_config(**scan)
        config = config.model_copy(update={"mamba2": config.mamba2.model_copy(update={"chunk_size": 4})})
        mixer = Mamba2(config, 0)
        initialize(mixer, 0)
        with FlopCounterMode(display=False) as counter:
            mixer(torch.randn(1, 12, 24), Context(scan=Scan.of_grid((3, 4), "cpu")))
        assert mixer.flops(12) == counter.get_total_flops()


def test_scanned_length():
    assert scanned_length(small_config(), 0, 100) == 100
    assert scanned_length(diffusion_config(orders=["column", "raster"]), 1, 12) == 12
    assert scanned_length(diffusion_config(orders=["column", "raster"], merge="sum"), 1, 12) == 24
    # Of 3 x 4 tokens: 3 rows, 4 columns; 24 tokens have twice as many.
    assert scanned_length(diffusion_config(orders=["raster"], line_ends=True), 1, 12) == 15
    both = diffusion_config(orders=["raster", "column"], merge="sum", line_ends=True)
    assert scanned_length(both, 1, 12) == 32 and scanned_length(both, 1, 24) == 64
