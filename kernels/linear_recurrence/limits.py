"""What other packages' kernels cannot do, in words; read without importing them."""

from __future__ import annotations

import torch
from torch import Tensor


def fla_lacks(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
    with_final_state: bool,
) -> str | None:
    """Why fla's HGRN kernels (0.6.0) cannot serve this call."""
    if not log_decay:
        return "fla's hgrn takes logarithms of decays (log_decay=True), so none that is zero or negative"
    if torch.float64 in (a.dtype, b.dtype):
        return "fla's hgrn keeps states in float32"
    if with_final_state and b.dtype != torch.float32:
        return f"fla's hgrn returns final states in {b.dtype}, not in float32"
    return None
