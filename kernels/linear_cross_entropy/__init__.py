"""Cross-entropy of a linear head, whole or cut over the vocabulary. N tokens, D hidden size, V rows held."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, promote_types

from triptych.kernels import dispatch
from triptych.kernels.library import autocast_dtype
from triptych.kernels.linear_cross_entropy import reference
from triptych.kernels.linear_cross_entropy import torch as fast

dispatch.register("linear_cross_entropy", dispatch.Form("torch", fast.linear_logsumexp))
dispatch.register("linear_cross_entropy", dispatch.Form("reference", reference.linear_logsumexp))


class VocabShards(Protocol):
    """What the caller supplies when the vocabulary is cut over ranks; all-reduces need no autograd."""

    @property
    def start(self) -> int:
        """Global number of the first vocabulary row held here."""

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the shards."""

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the shards."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    shards: VocabShards | None = None,
    form: str | None = None,
) -> Tensor:
    """-log softmax(hidden @ weight.T)[target] + z_loss * logsumexp^2 for each token, without the full logits.

    hidden: (N, D). weight: (V, D), the rows held here. targets: (N,) integer, global ids; where they equal
    ignore_index the result and all gradients are 0. chunk_size: tokens whose logits exist at a time (default:
    as many as 16 MiB of fp32 hold). Returns (N,) in fp32 (fp64 for fp64). Under autocast the matmuls run in
    its dtype; log-sum-exp and dweight accumulate in fp32 in any case. With shards, dhidden is this shard's
    partial sum: the caller's collective adds them up.
    Raises ValueError for shapes that do not match and, on CPU and unsharded, for targets outside [0, V).
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be (N, D) and weight (V, D); "
            f"they are {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: targets must be ({hidden.shape[0]},), they are {tuple(targets.shape)}"
        )
    counted = targets != ignore_index
    # A subclass, such as a fake tensor, has no values to look at.
    if shards is None and type(targets) is Tensor and targets.device.type == "cpu":
        _check_targets(targets[counted], weight.shape[0])
    # An ignored token must not name a row, whatever ignore_index is.
    safe = targets.long().where(counted, -1)
    matmul_dtype = autocast_dtype(hidden) or promote_types(hidden.dtype, weight.dtype)
    run = dispatch.choose("linear_cross_entropy", form, hidden.device).run
    lse, picked = run(
        hidden,
        weight,
        safe,
        start=0 if shards is None else shards.start,
        chunk_size=chunk_size,
        matmul_dtype=matmul_dtype,
    )
    if shards is not None:
        lse, picked = _combine(lse, picked, shards)
    nll = lse - picked
    if z_loss:
        nll = nll + z_loss * lse.square()
    return nll.where(counted, 0.0)


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= vocab):
        raise ValueError(
            f"linear_cross_entropy: targets range from {int(targets.min())} to {int(targets.max())}, "
            f"but the vocabulary has {vocab} rows; do tokenizer and model agree?"
        )


def _combine(lse: Tensor, picked: Tensor, shards: VocabShards) -> tuple[Tensor, Tensor]:
    """Whole-vocabulary values whose gradients reach this shard's: d whole / d local is its probability."""
    local = lse.detach()
    top = shards.max(local.clone())
    whole = shards.sum((local - top).exp()).log() + top
    share = (local - whole).exp()
    # Each bracket is zero in value and carries the gradient.
    lse = whole + share * (lse - local)
    picked = shards.sum(picked.detach().clone()) + (picked - picked.detach())
    return lse, picked
