"""Rotary position embedding along one axis or several. B batch, T length, H heads, D head dim, A axes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.library import operator
from triptych.kernels.rotary import examples, reference
from triptych.kernels.rotary import torch as fast


@operator(free=("positions",))
def rotary(
    x: Tensor,
    positions: Tensor,
    theta: float = 10000.0,
    *,
    frequencies: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """Rotate channel pairs (i, i + D/2) by position * theta^(-2i/D) (RoFormer, arXiv 2104.09864).

    x: (B, T, H, D), D even. positions: integer, (T,) or (B, T). frequencies: (D/2,), radians per position, in
    place of theta's. The pairing is the "rotate half" one of Llama and transformers, not the interleaved one
    of the paper. Computed in fp32 (fp64 for fp64); returns x's shape and dtype. Saves the positions only (and
    the frequencies, if given). Raises ValueError for shapes that do not match.
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotary: x must be (B, T, H, D) with an even D, it is {tuple(x.shape)}")
    if positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"rotary: positions must be (T,) or (B, T) = {tuple(x.shape[:2])}, not {tuple(positions.shape)}"
        )
    if frequencies is not None and frequencies.shape != (x.shape[-1] // 2,):
        raise ValueError(
            f"rotary: frequencies must be ({x.shape[-1] // 2},) for D={x.shape[-1]}, "
            f"not {tuple(frequencies.shape)}"
        )
    frequencies = None if frequencies is None else frequencies.unsqueeze(0)
    return _run("rotary", form, x, positions.unsqueeze(-1), theta, frequencies)


@operator(free=("positions",))
def axial_rotary(
    x: Tensor,
    positions: Tensor,
    theta: float = 10000.0,
    *,
    frequencies: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """Rotary positions of a grid of A axes: axis a turns the a-th of A equal parts of the channels, as
    `rotary` would turn a head of D/A channels (arXiv 2403.13298, "axial", for images).

    x: (B, T, H, D), D a multiple of 2A. positions: integer, (T, A) or (B, T, A), such as row and column.
    frequencies: (A, D/2A), radians per position along each axis, in place of theta^(-2Ai/D) for all.
    Precision, result and what is saved are those of `rotary`. Raises ValueError for shapes that do not match.
    """
    axes = positions.shape[-1] if positions.dim() else 0
    if x.dim() != 4 or axes == 0 or positions.shape not in ((*x.shape[1:2], axes), (*x.shape[:2], axes)):
        raise ValueError(
            "axial_rotary: x must be (B, T, H, D) and positions (T, A) or (B, T, A); they are "
            f"{tuple(x.shape)} and {tuple(positions.shape)}"
        )
    if x.shape[-1] % (2 * axes):
        raise ValueError(
            f"axial_rotary: {axes} axes need a head size that is a multiple of {2 * axes}, not {x.shape[-1]}"
        )
    expected = (axes, x.shape[-1] // axes // 2)
    if frequencies is not None and frequencies.shape != expected:
        raise ValueError(
            f"axial_rotary: frequencies must be {expected} for {axes} axes and D={x.shape[-1]}, "
            f"not {tuple(frequencies.shape)}"
        )
    return _run("axial_rotary", form, x, positions, theta, frequencies)


def _run(
    op: str, form: str | None, x: Tensor, positions: Tensor, theta: float, frequencies: Tensor | None
) -> Tensor:
    """positions: (T, A) or (B, T, A). frequencies: (A, D/2A) or None."""
    arguments = (x, positions, float(theta), frequencies)
    return dispatch.choose(op, form, x.device, *arguments).run(*arguments)


def _triton_supports(x: Tensor, *_: Any) -> str | None:
    return None if x.shape[-1] <= 1024 else f"heads of {x.shape[-1]} channels, more than 1024"


for _op, _function, _makers in (
    ("rotary", rotary, examples.MAKERS),
    ("axial_rotary", axial_rotary, examples.AXIAL_MAKERS),
):
    dispatch.register(
        _op, triton_launch.form("triptych.kernels.rotary.triton", "rotary", supports=_triton_supports)
    )
    dispatch.register(_op, dispatch.Form("torch", fast.rotary))
    dispatch.register(_op, dispatch.Form("reference", reference.rotary))
    dispatch.register_examples(_op, _function, _makers)
