"""Feed-forwards of many experts, on rows sorted by expert.

A rows, E experts, C channels, F inner channels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from triptych.kernels import dispatch, triton_launch
from triptych.kernels.grouped_linear.products import needs_gpu, no_kernel
from triptych.kernels.grouped_mlp import examples, reference
from triptych.kernels.grouped_mlp import torch as fast
from triptych.kernels.library import autocast_dtype, operator


@operator(integers=("counts",))
def grouped_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    *,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Literal["swiglu", "gelu"] = "swiglu",
    form: str | None = None,
) -> Tensor:
    """y = down[e] (silu(gate[e] x) * (up[e] x)), or down[e] gelu(up[e] x), for the rows of each expert e.

    x: (A, C), rows sorted by expert. up, gate: (E, F, C). down: (E, C, F). counts: int64 (E,), >= 0: how many
    rows each expert has; they sum to A. up_bias, gate_bias: (E, F). down_bias: (E, C).
    activation: swiglu needs a gate, gelu (tanh approximation) has none. F may be any number: a part of the
    inner channels, as a shard has, gives a part of the sum. Returns (A, C) of x's dtype, or of autocast's.
    Saves x, the weights and what goes into the activation, one or two (A, F); the activation is computed
    again in backward. Experts without rows get gradients of zero, not none.
    Forms grouped_mm and triton do not wait for the counts on a GPU; triton lets them sum to less than A, and
    gives the rows after them zeros. Routing weights are `moe_combine`'s, which reads the rows anyway.
    Raises ValueError for what does not fit.
    """
    _check(x, up, down, counts, gate, activation)
    for name, bias, like in (
        ("up_bias", up_bias, up),
        ("gate_bias", gate_bias, gate),
        ("down_bias", down_bias, down),
    ):
        if bias is not None and (like is None or bias.shape != like.shape[:2]):
            expected = "left out, as there is no gate" if like is None else tuple(like.shape[:2])
            raise ValueError(f"grouped_mlp: {name} must be {expected}, it is {tuple(bias.shape)}")
    arguments = (x, up, down, counts, gate, up_bias, gate_bias, down_bias, activation)
    return dispatch.choose("grouped_mlp", form, x.device, *arguments).run(*arguments)


def _check(x: Tensor, up: Tensor, down: Tensor, counts: Tensor, gate: Tensor | None, activation: str) -> None:
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"grouped_mlp: activation={activation!r} does not exist; use swiglu or gelu")
    if (gate is not None) != (activation == "swiglu"):
        given = "none was given" if gate is None else "one was given"
        raise ValueError(f"grouped_mlp: swiglu needs a gate, gelu has none; activation={activation}, {given}")
    if (
        x.dim() != 2
        or up.dim() != 3
        or up.shape[2] != x.shape[1]
        or (gate is not None and gate.shape != up.shape)
    ):
        raise ValueError(
            f"grouped_mlp: x must be (A, C), up and gate (E, F, C); they are {tuple(x.shape)}, "
            f"{tuple(up.shape)} and {None if gate is None else tuple(gate.shape)}"
        )
    if down.shape != (up.shape[0], up.shape[2], up.shape[1]):
        raise ValueError(
            f"grouped_mlp: down must be (E, C, F) = {(up.shape[0], up.shape[2], up.shape[1])}, it is "
            f"{tuple(down.shape)}"
        )
    if counts.shape != up.shape[:1] or counts.is_floating_point():
        raise ValueError(
            f"grouped_mlp: counts must be int64 ({up.shape[0]},), one per expert; they are {counts.dtype} "
            f"{tuple(counts.shape)}"
        )


def _no_kernel(x: Tensor, up: Tensor, *rest: Tensor | str | None) -> str | None:
    return no_kernel(x.device, autocast_dtype(x) or x.dtype, *up.shape[1:])


# PyTorch's own kernel where it has one, which does not wait for the counts; then ours, which serves the rest;
# then the loop over experts.
dispatch.register(
    "grouped_mlp", dispatch.Form("grouped_mm", fast.grouped_mlp, supports=_no_kernel, installed=needs_gpu)
)
dispatch.register("grouped_mlp", triton_launch.form("triptych.kernels.grouped_mlp.triton", "grouped_mlp"))
dispatch.register("grouped_mlp", dispatch.Form("torch", fast.grouped_mlp))
dispatch.register("grouped_mlp", dispatch.Form("reference", reference.grouped_mlp))
dispatch.register_examples("grouped_mlp", grouped_mlp, examples.MAKERS)
