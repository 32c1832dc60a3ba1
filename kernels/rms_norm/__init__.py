"""RMS norm, gated and grouped. C channels."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.rms_norm import reference
from triptych.kernels.rms_norm import torch as fast

dispatch.register("rms_norm", dispatch.Form("torch", fast.rms_norm))
dispatch.register("rms_norm", dispatch.Form("reference", reference.rms_norm))


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    num_groups: int = 1,
    form: str | None = None,
) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight.

    x: (..., C). weight: (C,). gate: like x; then x * silu(gate) is normed, as Mamba-2 does before its output
    projection. num_groups: the mean is taken over each of so many equal runs of channels.
    Statistics are fp32 (fp64 for fp64 inputs); the result has x's dtype. Saved for backward: the inputs and
    one number per group and token. Raises ValueError for shapes that do not match.
    """
    channels = x.shape[-1]
    if weight.shape != (channels,):
        raise ValueError(
            f"rms_norm: weight must be ({channels},) like x's last dim, it is {tuple(weight.shape)}"
        )
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"rms_norm: gate {tuple(gate.shape)} must have the shape of x {tuple(x.shape)}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"rms_norm: num_groups={num_groups} does not divide the {channels} channels of x")
    run = dispatch.choose("rms_norm", form, x.device).run
    return run(x, weight, eps=eps, gate=gate, num_groups=num_groups)
