"""RMS norm of Liger (liger-kernel 0.8.5 was read), gated RMS norm of mamba-ssm (2.3.2 was read) and of
flash-linear-attention (0.6.0 was read)."""

from __future__ import annotations

from torch import Tensor


def liger_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None, num_groups: int, norm_before_gate: bool
) -> Tensor:
    """Everything in fp32, as its mode "gemma" has it, and not in place, where it would write dx over a dy
    that may be somebody else's too. Shapes as in the public function."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Arguments after eps: offset of the weight, casting mode, in place.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


def mamba_ssm_gated_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None, num_groups: int, norm_before_gate: bool
) -> Tensor:
    """Shapes as in the public function."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(
        x,
        weight,
        None,
        z=gate,
        eps=eps,
        group_size=x.shape[-1] // num_groups,
        norm_before_gate=norm_before_gate,
    )


def fla_gated_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None, num_groups: int, norm_before_gate: bool
) -> Tensor:
    """Shapes as in the public function."""
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    return rms_norm_gated(x, gate, weight, None, activation="swish", eps=eps)
