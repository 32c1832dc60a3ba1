"""Cross-entropy over full logits. N tokens, D hidden size, V vocabulary rows held."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.linear_cross_entropy.shards import VocabShards, combine


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_size: int | None,
    softcap: float | None,
    z_loss: float,
    shards: VocabShards | None,
    matmul_dtype: torch.dtype,
    recompute: bool,
) -> Tensor:
    """nll (N,). targets: global ids, -1 where a token does not count. Autograd by PyTorch."""
    logits = (hidden.to(matmul_dtype) @ weight.to(matmul_dtype).T).to(statistics_dtype(hidden, weight))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    local = targets - (0 if shards is None else shards.start)
    held = (local >= 0) & (local < weight.shape[0])
    picked = logits.gather(1, local.where(held, 0).unsqueeze(1)).squeeze(1)
    return combine(logits.logsumexp(-1), picked * held, targets >= 0, z_loss, shards)
