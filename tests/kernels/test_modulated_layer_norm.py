"""Layer norm under a modulation: the published formula, gradients of all inputs, dtypes, what is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import modulated_layer_norm
from triptych.kernels.layer_norm import torch as torch_ops
from triptych.kernels.layer_norm import triton as triton_ops
from triptych.kernels.layer_norm.lines import modulated_lines, splits, tile

FP32_FLOOR = 1e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8

# Modulations per row, per token, for all rows and tokens at once, and per token for all rows.
SHAPES = [(3, 1, 12), (3, 7, 12), (1, 1, 12), (1, 7, 12)]
FORMS = ["torch", "triton"]


def make_inputs(shape: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    # A mean well away from zero: what cancels in x - mean would show.
    x = 5 + torch.randn(3, 7, 12, dtype=dtype)
    return {"x": x, "shift": torch.randn(shape, dtype=dtype), "scale": torch.randn(shape, dtype=dtype)}


def published(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


@pytest.mark.parametrize("form", [*FORMS, "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_published_formula(
    shape: tuple[int, ...], form: str, agree: Callable[..., None]
) -> None:
    function = partial(modulated_layer_norm, eps=1e-3, form=form)
    agree(function, partial(published, eps=1e-3), make_inputs(shape))


@pytest.mark.parametrize(
    ("x", "modulation"),
    [
        ((2, 65, 6), (2, 1, 6)),
        ((1, 63, 6), (1, 63, 6)),
        ((2, 1, 6), (2, 1, 6)),
        ((2, 500, 1), (2, 1, 1)),
        ((2, 3, 4, 6), (2, 1, 1, 6)),
        ((2, 3, 4, 6), (1, 3, 4, 6)),
        ((5, 6), (5, 6)),
        ((5, 6), (1, 6)),
        ((6,), (6,)),
    ],
)
def test_triton_takes_any_number_of_dims_and_tokens(
    x: tuple[int, ...], modulation: tuple[int, ...], agree: Callable[..., None]
) -> None:
    inputs = {"x": x, "shift": modulation, "scale": modulation}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in inputs.items()}
    function = partial(modulated_layer_norm, eps=1e-2)
    agree(partial(function, form="triton"), partial(function, form="reference"), tensors, 1e-11)


def test_many_tokens_are_added_up_by_several_programs(agree: Callable[..., None]) -> None:
    lines = modulated_lines(torch.Size((2, 3000, 3)), torch.Size((2, 1, 3)))
    assert lines is not None and 1 < splits(lines) < 3000 / tile(lines).rows
    shift, scale = torch.randn(2, 2, 1, 3, dtype=torch.float64)
    inputs = {"x": torch.randn(2, 3000, 3, dtype=torch.float64), "shift": shift, "scale": scale}
    agree(partial(modulated_layer_norm, form="triton"), modulated_layer_norm, inputs, 1e-11)


def test_triton_leaves_other_modulations_to_the_next_form() -> None:
    x, per_column = torch.randn(2, 3, 4, 6), torch.randn(2, 1, 4, 6)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 6\) of x \(2, 3, 4, 6\) is neither per row nor per"):
        modulated_layer_norm(x, per_column, per_column, form="triton")
    expected = published(x, per_column, per_column)
    torch.testing.assert_close(modulated_layer_norm(x, per_column, per_column), expected)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients_by_finite_differences(shape: tuple[int, ...]) -> None:
    leaves = tuple(value.requires_grad_() for value in make_inputs(shape).values())
    assert torch.autograd.gradcheck(partial(modulated_layer_norm, eps=1e-2), leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_parts_of_one_tensor_modulate(tokens: int, form: str, agree: Callable[..., None]) -> None:
    """As the blocks use it: shift and scale are views of what one linear returned."""

    def split(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, both: function(x, *both.chunk(2, dim=-1))

    inputs = {"x": torch.randn(3, 7, 12).double(), "both": torch.randn(3, tokens, 24).double()}
    agree(split(partial(modulated_layer_norm, form=form)), split(published), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(form: str, agree: Callable[..., None]) -> None:
    def turned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, **rest: Tensor) -> Tensor:
            return function(x.transpose(0, 1).contiguous().transpose(0, 1), **rest).transpose(1, 2)

        return run

    agree(turned(partial(modulated_layer_norm, form=form)), turned(published), make_inputs())


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_accuracy(
    shape: tuple[int, ...], form: str, dtype: torch.dtype, floor: float, accurate: Callable[..., None]
) -> None:
    function = partial(modulated_layer_norm, form="reference")
    accurate(partial(modulated_layer_norm, form=form), function, make_inputs(shape, dtype), floor)


@pytest.mark.parametrize("ops", [torch_ops, triton_ops])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_registration(shape: tuple[int, ...], ops: Any) -> None:
    x, shift, scale = (value.requires_grad_() for value in make_inputs(shape).values())
    torch.library.opcheck(ops.modulated_layer_norm_op, (x, shift, scale, 1e-6))
    x, scale = x.detach(), scale.detach()
    y, mean, rstd = ops.modulated_layer_norm_op(x, shift.detach(), scale, 1e-6)
    torch.library.opcheck(ops.modulated_layer_norm_backward_op, (y, x, scale, mean, rstd))


@pytest.mark.parametrize("form", FORMS)
def test_saves_x_scale_and_two_numbers_per_token(form: str) -> None:
    leaves = {name: value.requires_grad_() for name, value in make_inputs().items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        modulated_layer_norm(**leaves, form=form)
    assert sorted(saved.values()) == sorted([3 * 7 * 12, 3 * 12, 3 * 7, 3 * 7])


@pytest.mark.parametrize("form", FORMS)
def test_a_bf16_modulation_of_an_fp32_stream_under_autocast(form: str) -> None:
    inputs = make_inputs(dtype=torch.float32)
    leaves = {name: value.to(torch.bfloat16) if name != "x" else value for name, value in inputs.items()}
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = modulated_layer_norm(**leaves, form=form)
    y.sum().backward()
    assert y.dtype == torch.float32
    x, shift, scale = (value.float() for value in leaves.values())
    torch.testing.assert_close(y, published(x, shift, scale))
    for leaf in leaves.values():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype


def test_errors_say_what_to_mend() -> None:
    x, one = torch.zeros(2, 5, 4), torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match=r"shift \(2, 1, 4\) .* and scale \(2, 5, 4\) .* must have one"):
        modulated_layer_norm(x, one, torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"float32 and scale \(2, 1, 4\) torch.float64 must have one"):
        modulated_layer_norm(x, one, one.double())
    for shape in ((2, 4), (2, 5, 1), (3, 1, 4), (2, 2, 4)):
        with pytest.raises(ValueError, match=r"must have x's dims \(2, 5, 4\), or 1"):
            modulated_layer_norm(x, torch.zeros(shape), torch.zeros(shape))
