"""Scan orders: both ways against plain indexing, permutations of all kinds, registration, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from triptych.kernels import invert_orders, scan_gather, scan_scatter
from triptych.kernels.scan_order import torch as fast
from triptych.kernels.scan_order import triton as with_triton
from triptych.models.scan_order import scan_order

FORMS = ["torch", "triton"]
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8


def random_orders(*shape: int) -> Tensor:
    """Permutations, int64 (..., T)."""
    return torch.rand(*shape).argsort(-1)


@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_gather_visits_the_tokens_of_each_order(form: str) -> None:
    x = torch.arange(2 * 6.0).view(2, 6, 1)
    orders = torch.stack([scan_order(name, (2, 3)) for name in ("column", "raster+reverse")])
    y = scan_gather(x, orders, form=form)
    assert y.squeeze(-1).tolist() == [
        [0, 3, 1, 4, 2, 5],
        [6, 9, 7, 10, 8, 11],
        [5, 4, 3, 2, 1, 0],
        [11, 10, 9, 8, 7, 6],
    ]


@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_the_mean_brings_every_token_back(form: str) -> None:
    x, orders = torch.randn(3, 20, 5, dtype=torch.float64), random_orders(4, 20)
    back = scan_scatter(scan_gather(x, orders, form=form), orders, reduce="mean", form=form)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("count", "batch", "length", "channels"), [(1, 2, 1, 3), (1, 1, 63, 1), (4, 2, 65, 7), (3, 3, 500, 5)]
)
def test_agrees_with_the_reference(
    count: int, batch: int, length: int, channels: int, by_row: bool, form: str, agree: Callable[..., None]
) -> None:
    orders = random_orders(count, batch, length) if by_row else random_orders(count, length)
    x = torch.randn(batch, length, channels, dtype=torch.float64)
    y = torch.randn(count * batch, length, channels, dtype=torch.float64)
    gather = partial(scan_gather, orders=orders)
    agree(partial(gather, form=form), partial(gather, form="reference"), {"x": x})
    for reduce in ("sum", "mean"):
        scatter = partial(scan_scatter, orders=orders, reduce=reduce)
        agree(partial(scatter, form=form), partial(scatter, form="reference"), {"y": y})


@pytest.mark.parametrize("form", FORMS)
def test_more_channels_and_tokens_than_a_block_has(form: str, agree: Callable[..., None]) -> None:
    orders = random_orders(2, 21)
    channels = with_triton.WIDEST + 3
    assert with_triton._tiles(21, channels) == (8, with_triton.WIDEST)
    gather, scatter = (partial(f, orders=orders) for f in (scan_gather, scan_scatter))
    x, y = (torch.randn(rows, 21, channels, dtype=torch.float64) for rows in (1, 2))
    agree(partial(gather, form=form), partial(gather, form="reference"), {"x": x})
    agree(partial(scatter, form=form), partial(scatter, form="reference"), {"y": y})


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(form: str, agree: Callable[..., None]) -> None:
    orders = random_orders(2, 9).t().contiguous().t()
    assert not orders.is_contiguous()

    def there_and_back(x: Tensor) -> Tensor:
        return scan_scatter(scan_gather(x, orders, form=form), orders, form=form)

    def strided(x: Tensor) -> tuple[Tensor, Tensor]:
        across, inside = x.mT.contiguous().mT, torch.nn.functional.pad(x, (2, 1, 1, 0))[:, 1:, 2:-1]
        return there_and_back(across), there_and_back(inside)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, 2 * x

    agree(strided, plain, {"x": torch.randn(2, 9, 5, dtype=torch.float64)})


@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_added_up_in_fp32(form: str, accurate: Callable[..., None]) -> None:
    orders = random_orders(4, 30)
    inputs = {"y": torch.randn(8, 30, 5, dtype=torch.bfloat16)}
    scatter = partial(scan_scatter, orders=orders)
    accurate(partial(scatter, form=form), partial(scatter, form="reference"), inputs, BF16_FLOOR)
    if form == "torch":  # Triton's interpreter cuts bf16 off instead of rounding it
        wide = scatter(inputs["y"].float(), form="reference").bfloat16()
        assert torch.equal(scatter(**inputs, form=form), wide)


def test_given_inverses_are_used(agree: Callable[..., None]) -> None:
    orders = random_orders(2, 3, 12)
    inverse = invert_orders(orders)
    assert torch.equal(inverse.gather(-1, orders), torch.arange(12).expand(2, 3, 12))
    inputs = {"y": torch.randn(6, 12, 4, dtype=torch.float64)}
    found = partial(scan_scatter, orders=orders, inverse=inverse)
    agree(found, partial(scan_scatter, orders=orders, form="reference"), inputs)


def test_integers_are_gathered_too() -> None:
    x, orders = torch.arange(10).view(1, 5, 2), random_orders(3, 5)
    expected = x[0][orders]
    for form in (*FORMS, "reference"):
        assert torch.equal(scan_gather(x, orders, form=form), expected)


def test_numerical_gradients() -> None:
    orders = random_orders(2, 4)
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scan_gather(x, orders), x)
    assert torch.autograd.gradcheck(lambda y: scan_scatter(y, orders, reduce="mean"), y)
    assert torch.autograd.gradgradcheck(lambda x: scan_gather(x, orders) ** 2, x)


@pytest.mark.parametrize("module", [fast, with_triton])
def test_registration(module: Any) -> None:
    orders = random_orders(2, 2, 5)
    inverse = invert_orders(orders)
    x, y = (torch.randn(rows, 5, 3, requires_grad=True) for rows in (2, 4))
    torch.library.opcheck(module.scan_gather_op, (x, orders, inverse, False))
    torch.library.opcheck(module.scan_scatter_op, (y, orders, inverse, True))


def test_meta_tensors_and_what_is_saved() -> None:
    orders = random_orders(2, 6)
    x = torch.randn(3, 6, 4, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scan_scatter(scan_gather(x, orders), orders)
    assert all(t.dtype == torch.int64 for t in saved), "nothing but orders"
    on_meta = scan_gather(x.to("meta"), orders.to("meta"))
    assert on_meta.shape == (6, 6, 4)


TOKENS = torch.zeros(2, 6, 3)
ORDERS = torch.arange(6).repeat(4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 3)}, r"x must be \(B, T, C\), it is \(6, 3\)"),
        ({"orders": ORDERS[0]}, r"orders must be \(K, T\) or \(K, B, T\) with \(B, T\) = \(2, 6\)"),
        ({"orders": ORDERS[:, :5]}, r"they are \(4, 5\)"),
        ({"orders": ORDERS.int()}, r"must be int64, they are torch.int32; use orders.long"),
        ({"orders": ORDERS.to("meta")}, "orders is on meta and x on cpu"),
        ({"orders": ORDERS[:0]}, "nothing to order"),
        ({"orders": ORDERS + 1}, "token numbers from 0 to T-1 = 5; they go from 1 to 6"),
        ({"orders": ORDERS // 2}, r"must be permutations; order \[0\] never visits token 3"),
        ({"inverse": ORDERS[:, :5]}, r"inverse must be like orders, torch.int64 \(4, 6\)"),
        ({"inverse": ORDERS.flip(1)}, "inverse does not invert the orders"),
        ({"form": "fast"}, "form='fast' does not exist"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan_gather(**{"x": TOKENS, "orders": ORDERS, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(6, 6, 3)}, r"y must be \(K B, T, C\)"),
        ({"orders": ORDERS[:, :5]}, r"scan_scatter: orders must be .* with \(B, T\) = \(2, 6\)"),
        ({"reduce": "max"}, "reduce='max' is not known; use 'sum' or 'mean'"),
    ],
)
def test_errors_of_scatter(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan_scatter(**{"y": torch.zeros(8, 6, 3), "orders": ORDERS, **change})
