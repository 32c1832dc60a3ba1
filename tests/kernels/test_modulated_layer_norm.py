"""Layer norm under a modulation: the published formula, gradients of all inputs, dtypes, what is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import modulated_layer_norm
from triptych.kernels.layer_norm.torch import modulated_layer_norm_backward_op, modulated_layer_norm_op

FP32_FLOOR = 1e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8

# Modulations per row, per token, for all rows and tokens at once, and per token for all rows.
SHAPES = [(3, 1, 12), (3, 7, 12), (1, 1, 12), (1, 7, 12)]


def make_inputs(shape: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    # A mean well away from zero: what cancels in x - mean would show.
    x = 5 + torch.randn(3, 7, 12, dtype=dtype)
    return {"x": x, "shift": torch.randn(shape, dtype=dtype), "scale": torch.randn(shape, dtype=dtype)}


def published(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_published_formula_and_the_reference(
    shape: tuple[int, ...], agree: Callable[..., None]
) -> None:
    function = partial(modulated_layer_norm, eps=1e-3)
    agree(function, partial(published, eps=1e-3), make_inputs(shape))
    agree(function, partial(function, form="reference"), make_inputs(shape))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients_by_finite_differences(shape: tuple[int, ...]) -> None:
    leaves = tuple(value.requires_grad_() for value in make_inputs(shape).values())
    assert torch.autograd.gradcheck(partial(modulated_layer_norm, eps=1e-2), leaves)


def test_parts_of_one_tensor_modulate(agree: Callable[..., None]) -> None:
    """As the blocks use it: shift and scale are views of what one linear returned."""

    def split(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, both: function(x, *both.chunk(2, dim=-1))

    inputs = {"x": torch.randn(3, 7, 12).double(), "both": torch.randn(3, 1, 24).double()}
    agree(split(modulated_layer_norm), split(published), inputs)


def test_strides_do_not_matter(agree: Callable[..., None]) -> None:
    def turned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, **rest: Tensor) -> Tensor:
            return function(x.transpose(0, 1).contiguous().transpose(0, 1), **rest).transpose(1, 2)

        return run

    agree(turned(modulated_layer_norm), turned(published), make_inputs())


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_accuracy(
    shape: tuple[int, ...], dtype: torch.dtype, floor: float, accurate: Callable[..., None]
) -> None:
    function = partial(modulated_layer_norm, form="reference")
    accurate(modulated_layer_norm, function, make_inputs(shape, dtype), floor)


@pytest.mark.parametrize("shape", SHAPES)
def test_registration(shape: tuple[int, ...]) -> None:
    x, shift, scale = (value.requires_grad_() for value in make_inputs(shape).values())
    torch.library.opcheck(modulated_layer_norm_op, (x, shift, scale, 1e-6))
    x, scale = x.detach(), scale.detach()
    y, mean, rstd = modulated_layer_norm_op(x, shift.detach(), scale, 1e-6)
    torch.library.opcheck(modulated_layer_norm_backward_op, (y, x, scale, mean, rstd))


def test_saves_x_scale_and_two_numbers_per_token() -> None:
    leaves = {name: value.requires_grad_() for name, value in make_inputs().items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        modulated_layer_norm(**leaves)
    assert sorted(saved.values()) == sorted([3 * 7 * 12, 3 * 12, 3 * 7, 3 * 7])


def test_a_bf16_modulation_of_an_fp32_stream_under_autocast() -> None:
    inputs = make_inputs(dtype=torch.float32)
    leaves = {name: value.to(torch.bfloat16) if name != "x" else value for name, value in inputs.items()}
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = modulated_layer_norm(**leaves)
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
