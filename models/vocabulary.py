"""The two ends of a language model, cut over the vocabulary under tensor parallelism.

Shape legend: B batch, T length, C hidden size, V rows of the vocabulary held here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from triptych import kernels
from triptych.models.config import LanguageConfig
from triptych.models.init import Init, Normal
from triptych.models.linear import unset
from triptych.models.sharding import VOCAB, Shards


class Embedding(nn.Module):
    """Token ids -> vectors. weight: (V, C).

    With cut rows parallel/tensor.py sets `shards.start` to the first row held; tokens of other ranks then
    give zeros, and the sum over the ranks is the embedding.
    """

    tp_region = True

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.weight = unset(config.vocab_size, config.hidden_size)
        self.vocab_size = config.vocab_size
        self.std = config.init_std
        self.sharding = {"weight": VOCAB}
        self.shards = Shards()

    def init(self) -> dict[str, Init]:
        return {"weight": Normal(self.std)}

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """int (B, T) -> (B, T, C)."""
        rows = self.weight.shape[0]
        if rows == self.vocab_size:
            return F.embedding(tokens_BT, self.weight)
        local_BT = tokens_BT - self.shards.start
        absent_BT = (local_BT < 0) | (local_BT >= rows)
        x_BTC = F.embedding(local_BT.masked_fill(absent_BT, 0), self.weight)
        return x_BTC.masked_fill(absent_BT.unsqueeze(-1), 0.0)


class Head(nn.Module):
    """Hidden states -> cross-entropy per token, or logits. weight: (V, C), absent with tied embeddings.

    With cut rows parallel/tensor.py sets `shards` (start: first row held; sum, max over the tp axis). The
    cross-entropy is then that of the whole vocabulary on every rank and the gradient of the input a partial
    sum; logits are those of the rows held.
    """

    tp_region = True

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.std = config.init_std
        self.weight = None if config.tie_embeddings else unset(config.vocab_size, config.hidden_size)
        self.sharding = {} if config.tie_embeddings else {"weight": VOCAB}
        self.shards = Shards()

    def init(self) -> dict[str, Init]:
        return {} if self.weight is None else {"weight": Normal(self.std)}

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        rows = self.vocab_size if self.weight is None else self.weight.shape[0]
        return 2 * length * rows * self.hidden_size

    def forward(
        self,
        x_BTC: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        *,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T, C) -> fp32 (fp64 for fp64) cross-entropy (B, T), 0 where the target is -100; without targets
        logits (B, T, V).

        weight: the embedding's (V, C) where it is tied; under tensor parallelism the embedding's parameter as
        it stands (a DTensor), which the hook on this region makes local.
        """
        weight = self.weight if weight is None else weight
        assert weight is not None, "a tied head is called with the embedding's weight"
        if targets_BT is None:
            return F.linear(x_BTC, weight)
        shards = self.shards if self.shards.count > 1 else None
        nll_N = kernels.linear_cross_entropy(x_BTC.flatten(0, 1), weight, targets_BT.flatten(), shards=shards)
        return nll_N.view(targets_BT.shape)
