"""Adapter to flash-linear-attention (github.com/fla-org/flash-linear-attention, read at 0.6.0)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels.gated_linear_attention.external import in_one_row


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    bidirectional: bool,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """chunk_rwkv6, causal. Arguments as of the reference."""
    from fla.ops.rwkv6 import chunk_rwkv6

    return in_one_row(chunk_rwkv6, {"r": r, "k": k, "v": v, "w": w}, u=u.contiguous(), **options)
