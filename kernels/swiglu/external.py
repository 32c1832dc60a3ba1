"""SwiGLU's activation of Liger (liger-kernel 0.8.5 was read)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Liger(torch.autograd.Function):
    """Liger's own Function writes the gradients over gate and up, so that neither a second backward nor
    anybody else who kept them would find their values. Its two functions get copies here."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import swiglu_forward

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.swiglu import swiglu_backward

        gate, up = ctx.saved_tensors
        return swiglu_backward(gate.clone(), up.clone(), grads[0].contiguous())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes as in the public function."""
    return _Liger.apply(gate, up)
