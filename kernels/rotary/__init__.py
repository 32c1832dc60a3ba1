"""Rotary position embedding. B batch, T length, H heads, D head dim."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.rotary import reference
from triptych.kernels.rotary import torch as fast

dispatch.register("rotary", dispatch.Form("torch", fast.rotary))
dispatch.register("rotary", dispatch.Form("reference", reference.rotary))


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
    place of theta's. The pairing is the "rotate half" one of Llama
    and transformers, not the interleaved one of the paper. Computed in fp32 (fp64 for fp64); returns x's
    shape and dtype. Saves the positions only (and the frequencies, if given). Raises ValueError for shapes
    that do not match.
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
    return dispatch.choose("rotary", form, x.device).run(x, positions, theta, frequencies)
