"""Long convolution: the FFT against the sum over taps and conv1d, packing, registration, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import long_conv
from triptych.kernels.long_conv import torch as fast
from triptych.kernels.long_conv.torch import long_conv_backward_op, long_conv_op

FP32_FLOOR = 3e-6  # a sum of some hundred fp32 terms
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8

plain = partial(long_conv, form="reference")


def make_inputs(
    length: int, taps: int, *, batch: int = 2, channels: int = 3, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, length, channels, dtype=dtype),
        "kernel": torch.randn(channels, taps, dtype=dtype),
        "d": torch.randn(channels, dtype=dtype),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize(
    ("length", "taps"),
    [(1, 1), (1, 9), (2, 1), (63, 63), (64, 64), (65, 20), (65, 200), (500, 500), (1000, 65)],
)
def test_agrees_with_the_sum(length: int, taps: int, agree: Callable[..., None]) -> None:
    agree(long_conv, plain, make_inputs(length, taps))


@pytest.mark.parametrize("form", ["torch", "reference"])
def test_agrees_with_conv1d(form: str, agree: Callable[..., None]) -> None:
    def by_conv1d(x: Tensor, kernel: Tensor, d: Tensor) -> Tensor:
        padded = F.pad(x.mT, (kernel.shape[1] - 1, 0))
        return F.conv1d(padded, kernel.flip(1).unsqueeze(1), groups=x.shape[2]).mT + d * x

    agree(partial(long_conv, form=form), by_conv1d, make_inputs(30, 17))


def test_without_skip(agree: Callable[..., None]) -> None:
    inputs = make_inputs(40, 40)
    del inputs["d"]
    agree(long_conv, plain, inputs)


def test_strided_inputs(agree: Callable[..., None]) -> None:
    def strided(x: Tensor, kernel: Tensor, d: Tensor) -> Tensor:
        return long_conv(x.mT.contiguous().mT, kernel.t().contiguous().t(), d=d)

    agree(strided, long_conv, make_inputs(33, 20))
    agree(lambda x, **rest: long_conv(x[:, 3:, 1:], **rest), lambda x, **rest: plain(x[:, 3:, 1:], **rest), {
        **make_inputs(20, 9),
        "x": torch.randn(2, 20, 4, dtype=torch.float64),
    })  # fmt: skip


@pytest.mark.parametrize("elements", [1, 500, 1 << 20])
def test_tiles_of_channels(
    elements: int, agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fast.TILE_ELEMENTS, "cpu", elements)
    agree(long_conv, plain, make_inputs(30, 30, channels=19))


@pytest.mark.parametrize("taps", [1, 5, 100])
@pytest.mark.parametrize("bounds", [(0, 50, 100), (0, 1, 2, 30, 50, 65, 85, 100), (0, 25, 50, 75, 100)])
def test_packed_documents_are_separate_runs(
    bounds: tuple[int, ...], taps: int, agree: Callable[..., None]
) -> None:
    def separately(x: Tensor, **rest: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        ys = [long_conv(flat[None, start:end], **rest)[0] for start, end in itertools.pairwise(bounds)]
        return torch.cat(ys).view(x.shape)

    packed = partial(long_conv, cu_seqlens=cuts(*bounds))
    inputs = make_inputs(50, taps)
    agree(packed, separately, inputs)
    agree(packed, partial(packed, form="reference"), inputs)


def test_nothing_leaks_into_other_documents() -> None:
    inputs = make_inputs(100, 100, batch=1)
    x = inputs["x"].requires_grad_()
    packed = partial(long_conv, cu_seqlens=cuts(0, 30, 70, 100))
    before = packed(**inputs)
    (dx,) = torch.autograd.grad(before.sum(), x)
    with torch.no_grad():
        x[:, 30:70] = float("inf")
    after = packed(**inputs)
    (dx_after,) = torch.autograd.grad(after.sum(), x)
    for part in (slice(0, 30), slice(70, 100)):
        torch.testing.assert_close(after[:, part], before[:, part], rtol=0, atol=0)
        torch.testing.assert_close(dx_after[:, part], dx[:, part], rtol=0, atol=0)


def test_the_past_does_not_see_the_future() -> None:
    inputs = make_inputs(64, 64)
    before = long_conv(**inputs)
    inputs["x"][:, 40:] += 1.0
    torch.testing.assert_close(long_conv(**inputs)[:, :40], before[:, :40], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
def test_accuracy(dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(300, 300, dtype=dtype)
    assert long_conv(**inputs).dtype == dtype
    accurate(long_conv, plain, inputs, floor)


def test_autocast_leaves_it_alone() -> None:
    inputs = make_inputs(50, 50, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = long_conv(**inputs)
    assert torch.equal(cast, long_conv(**inputs))


def test_transforms_have_fast_sizes() -> None:
    for least in range(1, 3000, 7):
        size = fast.points(least)
        assert size >= least and size % 2 == 0
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1
        fits = (n for n in range(least, size) if n % 2 == 0)
        assert not any(_smooth(n) for n in fits), f"{size} is not the smallest for {least}"


def _smooth(n: int) -> bool:
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    return n == 1


def test_documents_share_transforms_of_about_their_length() -> None:
    x = torch.zeros(1, 1000, 2)
    groups = fast._groups(x, cuts(0, 500, 505, 605, 702, 1000))
    assert [(rows.count, rows.length) for rows in groups] == [(1, 500), (1, 5), (2, 100), (1, 298)]
    assert all(rows.tokens.numel() == rows.slots.numel() for rows in groups)


def test_numerical_gradients() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(6, 4, batch=1, channels=2).items()}
    names, packed = list(inputs), partial(long_conv, cu_seqlens=cuts(0, 2, 6))
    assert torch.autograd.gradcheck(lambda *v: packed(**dict(zip(names, v))), list(inputs.values()))


@pytest.mark.parametrize("options", ["none", "all"])
def test_registration_and_flops(options: str) -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(8, 8).items()}
    x, kernel, d = inputs.values()
    rest = (d, cuts(0, 5, 8, 16)) if options == "all" else (None, None)
    torch.library.opcheck(long_conv_op, (x, kernel, *rest))
    detached = [v.detach() if isinstance(v, Tensor) else v for v in (torch.randn_like(x), x, kernel, *rest)]
    torch.library.opcheck(long_conv_backward_op, tuple(detached))
    with FlopCounterMode(display=False) as counter:
        y = long_conv_op(x, kernel, *rest)
        forward = counter.get_total_flops()
        y.sum().backward()
    # 16 points: 160 FLOPs a transform of 2 rows of 3 channels and of the kernel, 48 a product.
    assert forward == 3 * (160 * 5 + 48 * 2)
    assert counter.get_total_flops() - forward == 3 * (160 * 8 + 48 * 4)


def test_meta_tensors_and_what_is_saved() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(32, 32).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        long_conv(**inputs)
    assert {t.data_ptr() for t in saved} == {v.data_ptr() for v in inputs.values()}
    on_meta = {k: v.detach().to("meta").requires_grad_() for k, v in inputs.items()}
    long_conv(**on_meta).sum().backward()
    assert all(v.grad.shape == v.shape for v in on_meta.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": torch.zeros(4, 6)}, r"kernel \(C, K\); they are \(2, 6, 3\) and \(4, 6\)"),
        ({"x": torch.zeros(6, 3)}, r"x must be \(B, T, C\)"),
        ({"x": torch.zeros(2, 0, 3)}, "at least 1 token and 1 tap"),
        ({"d": torch.zeros(4)}, r"d must be \(C,\) = \(3,\), it is \(4,\)"),
        ({"cu_seqlens": cuts(0, 6)}, r"end at B\*T = 2\*6 = 12"),
        ({"form": "triton"}, r"form='triton' does not exist; use one of \['torch', 'reference'\]"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_conv(**{**make_inputs(6, 6), **change})
