"""Linear layers of many experts at once, on rows sorted by expert. A rows, E experts, I inputs, O outputs."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.grouped_linear import examples, reference
from triptych.kernels.grouped_linear import torch as fast
from triptych.kernels.grouped_linear.products import needs_gpu, no_kernel
from triptych.kernels.library import autocast_dtype, operator


@operator(integers=("counts",))
def grouped_linear(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, *, form: str | None = None
) -> Tensor:
    """y = x @ weight[e].T + bias[e] for the rows of each expert e.

    x: (A, I), rows sorted by expert. weight: (E, O, I). counts: int64 (E,), >= 0: how many rows each expert
    has; they sum to A. bias: (E, O). Returns (A, O) of x's dtype, or of autocast's where that is on.
    Experts without rows get gradients of zero, not none. Saves x and weight. Forms grouped_mm and
    triton do not wait for the counts on a GPU; triton lets them sum to less than A, and gives the rows after
    them zeros. Raises ValueError for what does not fit; counts that do not sum to A are noticed on the CPU by
    the other forms.
    """
    _check(x, weight, counts, bias)
    arguments = (x, weight, counts, bias)
    return dispatch.choose("grouped_linear", form, x.device, *arguments).run(*arguments)


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


def _no_kernel(x: Tensor, weight: Tensor, *rest: Tensor | None) -> str | None:
    return no_kernel(x.device, autocast_dtype(x) or x.dtype, *weight.shape[1:])


# PyTorch's own kernel where it has one, which does not wait for the counts; then ours, which serves the rest;
# then the loop over experts.
dispatch.register(
    "grouped_linear",
    dispatch.Form("grouped_mm", fast.grouped_linear, supports=_no_kernel, installed=needs_gpu),
)
dispatch.register(
    "grouped_linear", triton_launch.form("triptych.kernels.grouped_linear.triton", "grouped_linear")
)
dispatch.register("grouped_linear", dispatch.Form("torch", fast.grouped_linear))
dispatch.register("grouped_linear", dispatch.Form("reference", reference.grouped_linear))
dispatch.register_examples("grouped_linear", grouped_linear, examples.MAKERS)
