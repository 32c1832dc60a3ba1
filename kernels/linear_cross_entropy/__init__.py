"""Cross-entropy of a linear head, whole or cut over the vocabulary. N tokens, D hidden size, V rows held."""

from __future__ import annotations

from torch import Tensor, promote_types
from torch.compiler import is_compiling

from triptych.kernels import dispatch, external_packages, triton_launch
from triptych.kernels.library import autocast_dtype, operator
from triptych.kernels.linear_cross_entropy import examples, external, reference
from triptych.kernels.linear_cross_entropy import torch as fast
from triptych.kernels.linear_cross_entropy.shards import VocabShards

__all__ = ["VocabShards", "linear_cross_entropy"]


@operator(integers=("targets",))
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    shards: VocabShards | None = None,
    recompute: bool = False,
    form: str | None = None,
) -> Tensor:
    """-log softmax(s)[target] + z_loss * logsumexp(s)^2 for each token, s = hidden @ weight.T, capped or not,
    without the full logits.

    hidden: (N, D). weight: (V, D), the rows held here. targets: (N,) integer, global ids; where they equal
    ignore_index the result and all gradients are 0. chunk_size: tokens whose logits exist at a time (default:
    D / 2, more where V is small). softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
    recompute: see below. Returns (N,) in fp32 (fp64 for fp64). Under autocast the matmuls run in its dtype;
    log-sum-exp and dweight accumulate in fp32 in any case. With shards, dhidden is this shard's partial sum:
    the caller's collective adds them up.

    Forward computes gradients as well, where some are wanted and there are no shards: three matrix products
    in all, with dhidden (N, D) and dweight (V, D) kept for backward. That dweight is right where the
    cotangents of all tokens that count are equal, as under sum and mean; backward looks (an accelerator is
    waited for), and computes it again where they are not. With recompute nothing is kept, and backward
    computes the logits once more, a fourth product; so it is with shards.
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
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size={chunk_size} must be at least 1, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap={softcap} must be above 0, or None for no cap")
    counted = targets != ignore_index
    # A subclass, such as a fake tensor, has no values to look at.
    plain = type(targets) is Tensor and targets.device.type == "cpu" and not is_compiling()
    if shards is None and plain:
        _check_targets(targets[counted], weight.shape[0])
    # An ignored token must not name a row, whatever ignore_index is.
    safe = targets.long().where(counted, -1)
    arguments = {
        "chunk_size": chunk_size,
        "softcap": softcap,
        "z_loss": z_loss,
        "shards": shards,
        "recompute": recompute,
        "matmul_dtype": autocast_dtype(hidden) or promote_types(hidden.dtype, weight.dtype),
    }
    chosen = dispatch.choose("linear_cross_entropy", form, hidden.device, hidden, weight, safe, **arguments)
    return chosen.run(hidden, weight, safe, **arguments)


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= vocab):
        raise ValueError(
            f"linear_cross_entropy: targets range from {int(targets.min())} to {int(targets.max())}, "
            f"but the vocabulary has {vocab} rows; do tokenizer and model agree?"
        )


dispatch.register(
    "linear_cross_entropy",
    triton_launch.form("triptych.kernels.linear_cross_entropy.triton", "linear_cross_entropy"),
)
dispatch.register(
    "linear_cross_entropy",
    external_packages.form(
        "liger",
        "liger_kernel",
        "triptych.kernels.linear_cross_entropy.external",
        "liger",
        supports=external.supports_liger,
    ),
)
dispatch.register("linear_cross_entropy", dispatch.Form("torch", fast.linear_cross_entropy))
dispatch.register("linear_cross_entropy", dispatch.Form("reference", reference.linear_cross_entropy))
dispatch.register_examples("linear_cross_entropy", examples.both_ways, examples.MAKERS)
