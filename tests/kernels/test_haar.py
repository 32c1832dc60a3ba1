"""Haar wavelet packets: against their matrix, against the reference, orthonormal and undone exactly."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from triptych import kernels

# Square and long grids, one block alone, and one channel.
CASES = [(1, (2, 3, 4), 5), (1, (1, 1, 1), 1), (2, (2, 1, 3), 4), (2, (3, 4, 4), 2), (3, (1, 2, 1), 3)]
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def grid(levels: int, blocks: tuple[int, int, int], channels: int, dtype=torch.float64) -> torch.Tensor:
    batch, rows, columns = blocks
    return torch.randn(batch, rows * 2**levels, columns * 2**levels, channels, dtype=torch.float64).to(dtype)


def matrix(levels: int, height: int, width: int) -> torch.Tensor:
    """(S h w, H W), from the definition: a level passes low or high in each direction, every other of it."""
    rows, columns = torch.eye(height, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    bands = [(rows, columns)]
    for _ in range(levels):
        finer = []
        for down, across in bands:
            downs, acrosses = (
                [(m[0::2] + m[1::2]) / 2**0.5, (m[0::2] - m[1::2]) / 2**0.5] for m in (down, across)
            )
            finer += [(d, a) for d in downs for a in acrosses]
        bands = finer
    return torch.cat([torch.kron(down, across) for down, across in bands])


@pytest.mark.parametrize("form", ["torch", "reference"])
@pytest.mark.parametrize(("levels", "blocks", "channels"), CASES)
def test_transform_and_inverse_equal_their_matrix_which_is_orthonormal(levels, blocks, channels, form):
    x = grid(levels, blocks, channels)
    B, H, W, C = x.shape
    M = matrix(levels, H, W)
    torch.testing.assert_close(M @ M.T, torch.eye(H * W, dtype=M.dtype), rtol=0, atol=1e-14)
    found = kernels.haar(x, levels, form=form)
    assert found.shape == (B, 4**levels, H >> levels, W >> levels, C)
    torch.testing.assert_close(found.view(B, -1, C), M @ x.view(B, -1, C), rtol=0, atol=1e-13)
    y = torch.randn_like(found)
    back = kernels.inverse_haar(y, levels, form=form)
    torch.testing.assert_close(back.view(B, -1, C), M.T @ y.view(B, -1, C), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("levels", "blocks", "channels"), CASES)
def test_fast_form_and_its_gradients_equal_the_reference(levels, blocks, channels, agree):
    x = grid(levels, blocks, channels)
    inputs = {"x": x}
    agree(
        lambda x: kernels.haar(x, levels, form="torch"),
        lambda x: kernels.haar(x, levels, form="reference"),
        inputs,
    )
    inputs = {"x": torch.randn_like(kernels.haar(x, levels))}
    agree(
        lambda x: kernels.inverse_haar(x, levels, form="torch"),
        lambda x: kernels.inverse_haar(x, levels, form="reference"),
        inputs,
    )


@pytest.mark.parametrize(("levels", "blocks", "channels"), CASES)
def test_reconstruction_is_perfect_and_the_gradient_is_the_inverse(levels, blocks, channels):
    x = grid(levels, blocks, channels).requires_grad_()
    y = kernels.haar(x, levels)
    torch.testing.assert_close(kernels.inverse_haar(y, levels), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(y.square().sum(), x.square().sum(), rtol=1e-14, atol=0)
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, kernels.inverse_haar(weights, levels), rtol=0, atol=1e-14)


def test_two_levels_by_hand():
    """A constant has one coefficient per block; stripes of one column are all in the finest band across."""
    x = torch.ones(1, 4, 4, 1)
    expected = torch.zeros(1, 16, 1, 1, 1)
    expected[0, 0] = 4.0
    assert torch.equal(kernels.haar(x, 2), expected)
    x[:, :, 1::2] = -1.0
    # Highpass across at the first level (subband 1 of 4), constant within it.
    expected = torch.zeros(1, 16, 1, 1, 1)
    expected[0, 4] = 4.0
    assert torch.equal(kernels.haar(x, 2), expected)


@pytest.mark.parametrize("dtype", FLOORS)
def test_in_lower_precision(dtype, accurate):
    inputs = {"x": grid(2, (2, 3, 4), 5, dtype)}
    accurate(
        lambda x: kernels.haar(x, 2), lambda x: kernels.haar(x, 2, form="reference"), inputs, FLOORS[dtype]
    )
    assert kernels.haar(inputs["x"], 2).dtype == dtype


def test_autocast_does_not_round_and_meta_has_shapes_and_flops():
    x = grid(2, (1, 2, 2), 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.haar(x, 2)
    assert torch.equal(y, kernels.haar(x, 2)) and y.dtype == torch.float32
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = kernels.haar(torch.empty(2, 8, 12, 5), 2)
        assert y.shape == (2, 16, 2, 3, 5) and kernels.inverse_haar(y, 2).shape == (2, 8, 12, 5)
    assert counter.get_total_flops() == 2 * 2 * 16 * 2 * 8 * 12 * 5


def test_nothing_of_the_input_is_saved():
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    x = grid(2, (2, 8, 8), 16).requires_grad_()  # 32,768 elements, and a matrix of 256
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.inverse_haar(kernels.haar(x, 2), 2)
    assert saved and max(saved) <= 2 * 256


def test_other_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r"levels=2 needs a height and width that are multiples of 4.*8 x 6;"
    ):
        kernels.haar(torch.zeros(1, 8, 6, 3), 2)
    with pytest.raises(ValueError, match="multiples of 2, and the grid is 5 x 6; use such a grid, or fewer"):
        kernels.haar(torch.zeros(1, 5, 6, 3), 1)
    with pytest.raises(ValueError, match="levels=0 must be at least 1"):
        kernels.haar(torch.zeros(1, 4, 4, 3), 0)
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, C\), it is \(4, 4, 3\)"):
        kernels.haar(torch.zeros(4, 4, 3), 1)
    with pytest.raises(
        ValueError, match=r"levels=2 needs coefficients \(B, 16, h, w, C\).*\(1, 4, 2, 2, 3\)"
    ):
        kernels.inverse_haar(torch.zeros(1, 4, 2, 2, 3), 2)
