"""RMS norm and layer norm: references, groups, gates, dtypes, registration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import layer_norm, rms_norm
from triptych.kernels.rms_norm.torch import rms_norm_backward_op, rms_norm_op

FP32_FLOOR = 1e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8


def make_inputs(*, gated: bool, channels: int = 12, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = {"x": torch.randn(3, 7, channels, dtype=dtype), "weight": torch.randn(channels, dtype=dtype)}
    return inputs | ({"gate": torch.randn(3, 7, channels, dtype=dtype)} if gated else {})


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_groups", [1, 3, 12])
def test_agrees_with_the_reference(gated: bool, num_groups: int, agree: Callable[..., None]) -> None:
    function = partial(rms_norm, num_groups=num_groups, eps=1e-3)
    agree(function, partial(function, form="reference"), make_inputs(gated=gated))


def test_agrees_with_pytorch(agree: Callable[..., None]) -> None:
    agree(
        partial(rms_norm, eps=1e-6),
        lambda x, weight: F.rms_norm(x, (12,), weight, 1e-6),
        make_inputs(gated=False),
    )


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
@pytest.mark.parametrize("gated", [True, False])
def test_accuracy(gated: bool, dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    function = partial(rms_norm, num_groups=2)
    accurate(function, partial(function, form="reference"), make_inputs(gated=gated, dtype=dtype), floor)


def test_huge_and_zero_rows_stay_finite() -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e18)]).requires_grad_()
    y = rms_norm(x, torch.ones(8))
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(y[1], torch.ones(8))


@pytest.mark.parametrize("gated", [True, False])
def test_registration(gated: bool) -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(gated=gated).items()}
    arguments = (inputs["x"], inputs["weight"], inputs.get("gate"), 1e-5, 2)
    torch.library.opcheck(rms_norm_op, arguments)
    x, weight, gate = (v if v is None else v.detach() for v in arguments[:3])
    y, rstd = rms_norm_op(x, weight, gate, 1e-5, 2)
    torch.library.opcheck(rms_norm_backward_op, (y, x, weight, gate, rstd, 2))


def test_saves_inputs_and_one_number_per_group() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(gated=True).items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        rms_norm(**inputs, num_groups=3)
    assert sorted(saved.values()) == sorted([*(v.numel() for v in inputs.values()), 3 * 7 * 3])


@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_autocast_keeps_the_dtype_of_x(function: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(x, weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_layer_norm(agree: Callable[..., None]) -> None:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    agree(layer_norm, plain, make_inputs(gated=False) | {"bias": torch.randn(12, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight must be \(12,\)"),
        ({"gate": torch.ones(3, 7, 6)}, "must have the shape of x"),
        ({"num_groups": 5}, "num_groups=5 does not divide the 12 channels"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**{**make_inputs(gated=False), **change})
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \(4,\)"):
        layer_norm(torch.ones(2, 4), None, torch.ones(3))
