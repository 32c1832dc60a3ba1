"""The gated residual: the formula, gradients of all inputs, dtypes, what is saved, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from triptych.kernels import gated_residual
from triptych.kernels.gated_residual.triton import gated_residual_backward_op, gated_residual_op

FORMS = ["torch", "triton"]
SHAPES = [(3, 1, 12), (3, 7, 12), (1, 1, 12), (1, 7, 12)]


def make_inputs(
    gate: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float64, tokens: int = 7
) -> dict[str, Tensor]:
    shapes = {"x": (3, tokens, 12), "y": (3, tokens, 12), "gate": gate}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def published(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate * y


@pytest.mark.parametrize("form", [*FORMS, "reference"])
@pytest.mark.parametrize("gate", SHAPES)
def test_agrees_with_the_formula(gate: tuple[int, ...], form: str, agree: Callable[..., None]) -> None:
    agree(partial(gated_residual, form=form), published, make_inputs(gate))


@pytest.mark.parametrize("tokens", [1, 63, 65, 2000])
def test_triton_at_any_number_of_tokens(tokens: int, agree: Callable[..., None]) -> None:
    agree(partial(gated_residual, form="triton"), published, make_inputs(tokens=tokens), 1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_views_and_strides_do_not_matter(tokens: int, form: str, agree: Callable[..., None]) -> None:
    """As the blocks use it: the gate is a view of what one linear returned."""

    def viewed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, y: Tensor, gates: Tensor) -> Tensor:
            turned = x.transpose(0, 1).contiguous().transpose(0, 1)
            return function(turned, y, gates.chunk(3, dim=-1)[1]).transpose(1, 2)

        return run

    inputs = make_inputs()
    del inputs["gate"]
    inputs["gates"] = torch.randn(3, tokens, 36, dtype=torch.float64)
    agree(viewed(partial(gated_residual, form=form)), viewed(published), inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_accuracy(form: str, dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    plain = partial(gated_residual, form="reference")
    accurate(partial(gated_residual, form=form), plain, make_inputs(dtype=dtype), floor)


@pytest.mark.parametrize("form", FORMS)
def test_the_result_has_the_dtype_of_the_stream(form: str) -> None:
    for stream, branch in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        inputs = make_inputs(dtype=branch)
        inputs["x"] = inputs["x"].to(stream)
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = gated_residual(**leaves, form=form)
        out.sum().backward()
        assert out.dtype == stream
        torch.testing.assert_close(
            out.float(), published(**{k: v.float() for k, v in leaves.items()}), atol=0.05, rtol=0.01
        )
        for leaf in leaves.values():
            assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize("form", FORMS)
def test_saves_the_branch_and_the_gate(form: str) -> None:
    leaves = {name: value.requires_grad_() for name, value in make_inputs().items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        gated_residual(**leaves, form=form)
    assert sorted(saved.values()) == sorted([3 * 7 * 12, 3 * 12])


@pytest.mark.parametrize("gate", SHAPES[:2])
def test_gradients_by_finite_differences_and_registration(gate: tuple[int, ...]) -> None:
    leaves = tuple(value.requires_grad_() for value in make_inputs(gate, tokens=7).values())
    assert torch.autograd.gradcheck(partial(gated_residual, form="triton"), leaves, fast_mode=True)
    torch.library.opcheck(gated_residual_op, leaves)
    out, y, g = (leaf.detach() for leaf in leaves)
    torch.library.opcheck(gated_residual_backward_op, (out, y, g))


def test_errors_say_what_to_mend() -> None:
    x, gate = torch.zeros(2, 5, 4), torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match=r"y \(2, 4, 4\) must have the shape of x \(2, 5, 4\)"):
        gated_residual(x, torch.zeros(2, 4, 4), gate)
    for shape in ((2, 4), (2, 5, 1), (3, 1, 4), (2, 2, 4)):
        with pytest.raises(ValueError, match=r"must have x's dims \(2, 5, 4\), or 1"):
            gated_residual(x, x, torch.zeros(shape))
    with pytest.raises(ValueError, match="is neither per row nor per token"):
        gated_residual(
            torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4), torch.zeros(2, 1, 5, 4), form="triton"
        )
