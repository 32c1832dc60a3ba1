"""Haar wavelet packets of images. B batch, H height, W width, C channels, S = 4^levels subbands of h x w."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.haar import examples, reference
from triptych.kernels.haar import torch as fast
from triptych.kernels.library import operator


@operator()
def haar(x: Tensor, levels: int, *, form: str | None = None) -> Tensor:
    """Orthonormal 2-D Haar transform, each level of every subband of the one before (a wavelet packet).

    x: (B, H, W, C); levels >= 1, and 2^levels divides H and W. Returns (B, S, h, w, C) of x's dtype, where
    S = 4^levels, h = H / 2^levels and w = W / 2^levels. A level turns each 2 x 2 block [[p, q], [r, s]] into
    four subbands, (p+q+r+s)/2, (p-q+r-s)/2, (p+q-r-s)/2 and (p-q-r+s)/2. Subband 0 is the coarsest; those
    made of the first subband of a level stand before those of the second, and so on.
    Linear and orthonormal: its gradient is the inverse, and nothing of x is saved.
    Raises ValueError for other shapes, with the sizes that would do.
    """
    if x.dim() != 4:
        raise ValueError(f"haar: x must be (B, H, W, C), it is {tuple(x.shape)}")
    if levels < 1:
        raise ValueError(f"haar: levels={levels} must be at least 1")
    block = 2**levels
    _, height, width, _ = x.shape
    if height % block or width % block or not height * width:
        raise ValueError(
            f"haar: levels={levels} needs a height and width that are multiples of {block}, and the grid is "
            f"{height} x {width}; use such a grid, or fewer levels"
        )
    return dispatch.choose("haar", form, x.device).run(x, levels)


@operator()
def inverse_haar(coefficients: Tensor, levels: int, *, form: str | None = None) -> Tensor:
    """The inverse of `haar`, (B, S, h, w, C) -> (B, H, W, C). Raises ValueError unless S is 4^levels."""
    if levels < 1 or coefficients.dim() != 5 or coefficients.shape[1] != 4**levels:
        raise ValueError(
            f"inverse_haar: levels={levels} needs coefficients (B, {4 ** max(levels, 1)}, h, w, C), they are "
            f"{tuple(coefficients.shape)}"
        )
    return dispatch.choose("inverse_haar", form, coefficients.device).run(coefficients, levels)


dispatch.register("haar", dispatch.Form("torch", fast.haar))
dispatch.register("haar", dispatch.Form("reference", reference.haar))
dispatch.register("inverse_haar", dispatch.Form("torch", fast.inverse_haar))
dispatch.register("inverse_haar", dispatch.Form("reference", reference.inverse_haar))
dispatch.register_examples("haar", haar, {"image": examples.image})
dispatch.register_examples("inverse_haar", inverse_haar, {"coefficients": examples.coefficients})
