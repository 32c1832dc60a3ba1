"""The end of a modulated branch: x + gate * y. B batch, T length, C channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.gated_residual import examples, reference
from triptych.kernels.gated_residual import torch as fast
from triptych.kernels.layer_norm.lines import modulated_lines, too_long
from triptych.kernels.library import operator


@operator()
def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, form: str | None = None) -> Tensor:
    """x + gate * y, the gated residual of adaLN-Zero (arXiv 2212.09748).

    x, y: (B, T, C). gate: each dim 1 or x's, and C the last: (B, 1, C) for one gate per row, (B, T, C) for
    one per token. Computed in fp32 (fp64 for fp64 inputs) and rounded once; the result has x's dtype,
    whatever that of y is. Saved for backward: y and gate. Raises ValueError for shapes that do not match.
    """
    if y.shape != x.shape:
        raise ValueError(f"gated_residual: y {tuple(y.shape)} must have the shape of x {tuple(x.shape)}")
    fits = gate.dim() == x.dim() and all(m in (1, n) for m, n in zip(gate.shape, x.shape))
    if not fits or gate.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"gated_residual: gate {tuple(gate.shape)} must have x's dims {tuple(x.shape)}, or 1 in place of "
            "those before the last"
        )
    return dispatch.choose("gated_residual", form, x.device, x, y, gate).run(x, y, gate)


def _triton_supports(x: Tensor, y: Tensor, gate: Tensor, **_: Any) -> str | None:
    if modulated_lines(x.shape, gate.shape) is None:
        return f"a gate {tuple(gate.shape)} of x {tuple(x.shape)} is neither per row nor per token"
    return too_long(x.shape[-1])


dispatch.register(
    "gated_residual",
    triton_launch.form("triptych.kernels.gated_residual.triton", "gated_residual", supports=_triton_supports),
)
dispatch.register("gated_residual", dispatch.Form("torch", fast.gated_residual))
dispatch.register("gated_residual", dispatch.Form("reference", reference.gated_residual))
dispatch.register_examples("gated_residual", gated_residual, examples.MAKERS)
