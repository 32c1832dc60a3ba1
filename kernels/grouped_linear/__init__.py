"""Linear layers of many experts at once, on rows sorted by expert. A rows, E experts, I inputs, O outputs."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.grouped_linear import reference
from triptych.kernels.grouped_linear import torch as fast

dispatch.register("grouped_linear", dispatch.Form("torch", fast.grouped_linear))
dispatch.register("grouped_linear", dispatch.Form("reference", reference.grouped_linear))


def grouped_linear(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, *, form: str | None = None
) -> Tensor:
    """y = x @ weight[e].T + bias[e] for the rows of each expert e.

    x: (A, I), rows sorted by expert. weight: (E, O, I). counts: int64 (E,), >= 0: how many rows each expert
    has; they sum to A. bias: (E, O). Returns (A, O) of x's dtype, or of autocast's where that is on.
    Experts without rows get gradients of zero, not none. Saves x and weight. On a GPU nothing waits for the
    device where `torch.nn.functional.grouped_mm` can serve: fp32, fp16 or bf16, and I and O fill 16 bytes.
    Raises ValueError for what does not fit; counts that do not sum to A are noticed on the CPU.
    """
    _check(x, weight, counts, bias)
    return dispatch.choose("grouped_linear", form, x.device).run(x, weight, counts, bias)


def _check(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"grouped_linear: x must be (A, I) and weight (E, O, I); they are {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if counts.shape != weight.shape[:1] or counts.is_floating_point():
        raise ValueError(
            f"grouped_linear: counts must be int64 ({weight.shape[0]},), one per expert; they are "
            f"{counts.dtype} {tuple(counts.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"grouped_linear: bias must be (E, O) = {tuple(weight.shape[:2])}, it is {tuple(bias.shape)}"
        )
