"""Liger's fused linear cross-entropy. Read in liger_kernel 0.8.5.

With reduction="none" it computes the logits again in backward and scales each token's row by its cotangent
before it sums over tokens, as we do with recompute=True. Versions before that one summed first. Its logits
are rounded to the dtype of the products, where ours keep fp32.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import Tensor

OLDEST = (0, 8, 5)


@torch.compiler.assume_constant_result
def _version() -> str:
    return importlib.metadata.version("liger_kernel")


def supports_liger(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> str | None:
    """Why Liger cannot serve such a call; None where it can."""
    version = _version()
    if tuple(int(part) for part in version.split(".")[:3] if part.isdecimal()) < OLDEST:
        return f"liger_kernel {version} gives all tokens one cotangent; 0.8.5 does not"
    if options["shards"] is not None:
        return "it knows process groups, but no shards as we hand them over"
    if options["chunk_size"] is not None:
        return "it chooses the size of its chunks itself; leave chunk_size out"
    if options["matmul_dtype"] not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take fp32, bf16 and fp16, not {options['matmul_dtype']}"
    if hidden.dtype != weight.dtype and options["matmul_dtype"] == torch.promote_types(
        hidden.dtype, weight.dtype
    ):
        return f"hidden is {hidden.dtype}, weight {weight.dtype}; it multiplies what has one dtype"
    return None


def liger(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None,
    z_loss: float,
    **options: Any,
) -> Tensor:
    """Shapes as in the reference; gradients of weights are added up in fp32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_index=-1,
        lse_square_scale=z_loss,
        reduction="none",
        softcap=softcap,
        accum_dtype=torch.float32,
    )
