"""Causal convolution against the token-by-token form and PyTorch's conv1d; states, packing, registration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import causal_conv1d
from triptych.kernels.causal_conv1d.torch import causal_conv1d_backward_op, causal_conv1d_op

FP32_FLOOR = 1e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8

full = partial(causal_conv1d, activation="silu", return_final_state=True)


def make_inputs(
    length: int,
    *,
    batch: int = 2,
    channels: int = 5,
    taps: int = 4,
    states: int = 2,
    dtype: Any = torch.float64,
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, length, channels, dtype=dtype),
        "weight": torch.randn(channels, taps, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
        "initial_state": torch.randn(states, channels, taps - 1, dtype=dtype),
    }


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (3, 4), (65, 4), (20, 1), (20, 2), (2, 7)])
@pytest.mark.parametrize("with_state", [True, False])
def test_agrees_with_the_reference(
    length: int, taps: int, with_state: bool, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(length, taps=taps)
    if not with_state:
        del inputs["initial_state"]
        agree(
            partial(causal_conv1d, activation="silu"),
            partial(causal_conv1d, activation="silu", form="reference"),
            inputs,
        )
    agree(full, partial(full, form="reference"), inputs)


def test_agrees_with_conv1d(agree: Callable[..., None]) -> None:
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
        return F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2]).mT

    inputs = make_inputs(30)
    del inputs["initial_state"]
    agree(causal_conv1d, plain, inputs)


def test_without_bias(agree: Callable[..., None]) -> None:
    inputs = make_inputs(9)
    del inputs["bias"]
    agree(full, partial(full, form="reference"), inputs)


@pytest.mark.parametrize("with_state", [True, False])
def test_packed_documents(with_state: bool, agree: Callable[..., None]) -> None:
    inputs = make_inputs(20, states=6)
    if not with_state:
        del inputs["initial_state"]
    packed = partial(full, cu_seqlens=torch.tensor([0, 1, 3, 12, 20, 38, 40], dtype=torch.int32))
    agree(packed, partial(packed, form="reference"), inputs)


def test_states_hand_over(agree: Callable[..., None]) -> None:
    def in_two(x: Tensor, initial_state: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        first, state = full(x=x[:, :2], initial_state=initial_state, **rest)
        second, state = full(x=x[:, 2:], initial_state=state, **rest)
        return torch.cat([first, second], 1), state

    agree(in_two, full, make_inputs(11))


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
def test_accuracy(dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    accurate(full, partial(full, form="reference"), make_inputs(100, dtype=dtype), floor)


def test_autocast_keeps_the_dtype_of_x() -> None:
    inputs = make_inputs(10, dtype=torch.float32)
    x = inputs.pop("x").bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = causal_conv1d(x, **inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, causal_conv1d(x, **inputs), rtol=0, atol=0)


@pytest.mark.parametrize(("silu", "history", "with_bias"), [(True, 3, True), (False, 0, False)])
def test_registration_and_flops(silu: bool, history: int, with_bias: bool) -> None:
    inputs = make_inputs(7)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    bias = inputs["bias"].requires_grad_() if with_bias else None
    torch.library.opcheck(causal_conv1d_op, (x, weight, bias, silu, history))
    y = causal_conv1d_op(x, weight, bias, silu, history).detach()
    detached = (x.detach(), weight.detach(), None if bias is None else bias.detach())
    torch.library.opcheck(causal_conv1d_backward_op, (y, *detached, silu, history))
    with FlopCounterMode(display=False) as counter:
        causal_conv1d_op(x, weight, bias, silu, history).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * y.numel() * weight.shape[1]


def test_numerical_gradients() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(5, channels=2).items()}
    names = list(inputs)
    assert torch.autograd.gradcheck(lambda *v: full(**dict(zip(names, v))), list(inputs.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 4)}, r"weight \(C, K\); they are \(2, 6, 5\) and \(4, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \(5,\)"),
        ({"activation": "relu"}, "activation='relu' is not known"),
        ({"initial_state": torch.zeros(2, 5, 4)}, r"initial_state must be \(2, 5, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 7, 12])}, "must contain every multiple of T=6"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**make_inputs(6), **change})
