"""Rotary positions, SwiGLU and GELU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import gelu, rotary, swiglu
from triptych.kernels.rotary.torch import rotary_op
from triptych.kernels.swiglu.torch import swiglu_backward_op, swiglu_op

FP32_FLOOR = 1e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8


def positions(packed: bool) -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]) if packed else torch.arange(5) + 1000


@pytest.mark.parametrize("packed", [True, False])
def test_rotary_agrees_with_the_reference(packed: bool, agree: Callable[..., None]) -> None:
    function = partial(rotary, positions=positions(packed), theta=500.0)
    agree(function, partial(function, form="reference"), {"x": torch.randn(2, 5, 3, 6).double()})


def test_rotary_agrees_with_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    angles = positions(True).unsqueeze(-1) * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, expected in zip((q, k), theirs):
        torch.testing.assert_close(rotary(ours, positions(True), 10000.0), expected.transpose(1, 2))


def test_rotary_is_relative_and_keeps_lengths() -> None:
    q, k = torch.randn(2, 1, 5, 1, 8).double().unbind(0)
    scores = [
        (rotary(q, p, 100.0) * rotary(k, p + 3, 100.0)).sum(-1)
        for p in (torch.arange(5), torch.arange(5) + 77)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(rotary(q, torch.arange(5), 100.0).norm(dim=-1), q.norm(dim=-1))


def test_swiglu_agrees_with_the_reference(agree: Callable[..., None]) -> None:
    inputs = {"gate": torch.randn(3, 4).double(), "up": torch.randn(3, 4).double()}
    agree(swiglu, partial(swiglu, form="reference"), inputs)
    agree(swiglu, lambda gate, up: F.silu(gate) * up, inputs)


def test_swiglu_takes_mixed_dtypes() -> None:
    gate, up = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(3, 4, requires_grad=True)
    y = swiglu(gate, up)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert gate.grad is not None and gate.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
def test_accuracy(dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    inputs = {"gate": 3 * torch.randn(30, 4, dtype=dtype), "up": torch.randn(30, 4, dtype=dtype)}
    accurate(swiglu, partial(swiglu, form="reference"), inputs, floor)
    function = partial(rotary, positions=torch.arange(30))
    x = {"x": torch.randn(2, 30, 3, 8, dtype=dtype)}
    accurate(function, partial(function, form="reference"), x, max(floor, 1e-5))


def test_registration() -> None:
    x = torch.randn(2, 5, 3, 6, requires_grad=True)
    torch.library.opcheck(rotary_op, (x, torch.arange(5), 100.0, None, False))
    gate, up = torch.randn(2, 3, 4, requires_grad=True).unbind(0)
    torch.library.opcheck(swiglu_op, (gate, up))
    torch.library.opcheck(swiglu_backward_op, (up.detach(), gate.detach(), up.detach()))


def test_gelu_saves_its_input_only() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gelu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(y, 0.5 * x * (1 + inner.tanh()))


def test_errors_say_what_to_mend() -> None:
    with pytest.raises(ValueError, match=r"rotary: x must be \(B, T, H, D\) with an even D"):
        rotary(torch.zeros(2, 5, 3, 7), torch.arange(5))
    with pytest.raises(ValueError, match=r"positions must be \(T,\) or \(B, T\) = \(2, 5\)"):
        rotary(torch.zeros(2, 5, 3, 8), torch.arange(4))
    with pytest.raises(ValueError, match=r"gate \(3,\) and up \(4,\) must have one shape"):
        swiglu(torch.zeros(3), torch.zeros(4))
