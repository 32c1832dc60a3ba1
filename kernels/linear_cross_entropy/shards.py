"""From the statistics of shards of the vocabulary to the loss of each token. N tokens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class VocabShards(Protocol):
    """What the caller supplies when the vocabulary is cut over ranks; all-reduces need no autograd."""

    @property
    def start(self) -> int:
        """Global number of the first vocabulary row held here."""

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the shards."""

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the shards."""


def combine(
    lse: Tensor, picked: Tensor, counted: Tensor, z_loss: float, shards: VocabShards | None
) -> Tensor:
    """nll (N,) from log-sum-exp and picked logit (N,) of this shard, 0 where a token does not count."""
    if shards is not None:
        lse, picked = _whole(lse, picked, shards)
    nll = lse - picked
    if z_loss:
        nll = nll + z_loss * lse.square()
    return nll.where(counted, 0.0)


def _whole(lse: Tensor, picked: Tensor, shards: VocabShards) -> tuple[Tensor, Tensor]:
    """Whole-vocabulary values whose gradients reach this shard's: d whole / d local is its probability."""
    local = lse.detach()
    top = shards.max(local.clone())
    whole = shards.sum((local - top).exp()).log() + top
    share = (local - whole).exp()
    # Each bracket is zero in value and carries the gradient.
    lse = whole + share * (lse - local)
    picked = shards.sum(picked.detach().clone()) + (picked - picked.detach())
    return lse, picked
