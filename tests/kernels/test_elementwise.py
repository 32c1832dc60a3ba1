"""SwiGLU, GEGLU and GELU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import geglu, gelu, swiglu
from triptych.kernels.geglu import external as external_geglu
from triptych.kernels.geglu import torch as torch_geglu
from triptych.kernels.geglu import triton as triton_geglu
from triptych.kernels.swiglu import external as external_swiglu
from triptych.kernels.swiglu import liger_supports
from triptych.kernels.swiglu import torch as torch_swiglu
from triptych.kernels.swiglu import triton as triton_swiglu

FP32_FLOOR = 1e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
FORMS = ["torch", "triton"]


def published_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def published_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


FUNCTIONS = [(swiglu, published_swiglu), (geglu, published_geglu)]


def make_inputs(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"gate": 3 * torch.randn(shape, dtype=dtype), "up": torch.randn(shape, dtype=dtype)}


@pytest.mark.parametrize("form", [*FORMS, "reference"])
@pytest.mark.parametrize(("function", "published"), FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 65, 37), ()])
def test_agrees_with_the_formula(
    function: Any, published: Any, form: str, shape: tuple[int, ...], agree: Callable[..., None]
) -> None:
    agree(partial(function, form=form), published, make_inputs(*shape))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("function", "published"), FUNCTIONS)
def test_halves_of_one_tensor(function: Any, published: Any, form: str, agree: Callable[..., None]) -> None:
    def halves(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda both: of(*both.chunk(2, dim=-1)).mT

    inputs = {"both": torch.randn(3, 5, 14, dtype=torch.float64)}
    agree(halves(partial(function, form=form)), halves(published), inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [swiglu, geglu])
def test_takes_mixed_dtypes(function: Any, form: str) -> None:
    gate, up = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(3, 4, requires_grad=True)
    y = function(gate, up, form=form)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert gate.grad is not None and gate.grad.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("function", "published"), FUNCTIONS)
def test_gates_wide_open_and_closed(
    function: Any, published: Any, form: str, agree: Callable[..., None]
) -> None:
    gate = torch.tensor([-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0])
    inputs = {"gate": gate, "up": torch.randn(7)}
    agree(partial(function, form=form), published, inputs, 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [swiglu, geglu])
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
def test_accuracy(
    function: Any, form: str, dtype: torch.dtype, floor: float, accurate: Callable[..., None]
) -> None:
    inputs = make_inputs(30, 4, dtype=dtype)
    accurate(partial(function, form=form), partial(function, form="reference"), inputs, floor)


@pytest.mark.parametrize("ops", [torch_swiglu, triton_swiglu, torch_geglu, triton_geglu])
def test_registration(ops: Any) -> None:
    name = ops.__name__.split(".")[-2]
    gate, up = torch.randn(2, 3, 4, requires_grad=True).unbind(0)
    torch.library.opcheck(getattr(ops, f"{name}_op"), (gate, up))
    torch.library.opcheck(getattr(ops, f"{name}_backward_op"), (up.detach(), gate.detach(), up.detach()))


def test_gradients_by_finite_differences() -> None:
    leaves = tuple(value.requires_grad_() for value in make_inputs(2, 3).values())
    assert torch.autograd.gradcheck(geglu, leaves) and torch.autograd.gradcheck(swiglu, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [swiglu, geglu])
def test_saves_its_inputs_only(function: Any, form: str) -> None:
    saved: list[Tensor] = []
    leaves = [value.requires_grad_() for value in make_inputs(4, 5).values()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*leaves, form=form)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in leaves]


def test_gelu_saves_its_input_only() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gelu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(y, 0.5 * x * (1 + inner.tanh()))


@pytest.mark.parametrize("function", [swiglu, geglu])
def test_errors_say_what_to_mend(function: Any) -> None:
    with pytest.raises(ValueError, match=r"gate \(3,\) and up \(4,\) must have one shape"):
        function(torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize(
    ("name", "adapter", "published"),
    [("swiglu", external_swiglu.swiglu, published_swiglu), ("geglu", external_geglu.geglu, published_geglu)],
)
def test_liger_writes_over_copies(
    name: str, adapter: Any, published: Any, peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins with the signatures of Liger's functions and their habit to leave gradients in the inputs."""
    module = pytest.importorskip(f"liger_kernel.ops.{name}")

    def forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gate, up, published(gate, up)

    def backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_() for x in (gate, up)]
            gradients = torch.autograd.grad(published(*leaves), leaves, dy)
        for tensor, gradient in zip((gate, up), gradients):
            tensor.copy_(gradient)
        return gate, up

    for suffix, stand_in in (("forward", forward), ("backward", backward)):
        theirs = inspect.signature(getattr(module, f"{name}_{suffix}"))
        theirs.bind(*inspect.signature(stand_in).parameters)
        monkeypatch.setattr(module, f"{name}_{suffix}", stand_in)
    leaves = [value.requires_grad_() for value in make_inputs(3, 5).values()]
    before = [value.detach().clone() for value in leaves]
    y = adapter(*leaves)
    expected = published(*leaves)
    for _ in range(2):
        found = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
        wanted = torch.autograd.grad(expected.sum(), leaves, retain_graph=True)
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(leaves, before)


def test_liger_is_refused_what_it_cannot_do() -> None:
    x = torch.zeros(2, 3)
    assert liger_supports(x, x) is None
    assert "one dtype of fp32, fp16 and bf16" in str(liger_supports(x, x.bfloat16()))
    assert "one dtype of fp32, fp16 and bf16" in str(liger_supports(x.double(), x.double()))
    assert "rows of up to 65536 elements" in str(liger_supports(torch.zeros(1, 65537), torch.zeros(1, 65537)))
