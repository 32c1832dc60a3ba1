"""Cross-entropy over full logits. N tokens, D hidden size, V vocabulary rows held."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    start: int,
    chunk_size: int | None,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (N,) of the logits and the target's logit (N,), 0 where another shard holds the target."""
    logits = (hidden.to(matmul_dtype) @ weight.to(matmul_dtype).T).to(statistics_dtype(hidden, weight))
    local = targets - start
    held = (local >= 0) & (local < weight.shape[0])
    picked = logits.gather(1, local.where(held, 0).unsqueeze(1)).squeeze(1)
    return logits.logsumexp(-1), picked * held
