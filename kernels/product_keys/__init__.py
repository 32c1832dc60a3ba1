"""Very many experts of rank one: finding them by product keys, and running them.

N tokens, H queries of a token, n keys of a half, D query size, J = H * k experts of a token,
E experts, C channels.
"""

from __future__ import annotations

from torch import Tensor

from triptych.kernels import dispatch
from triptych.kernels.library import operator
from triptych.kernels.product_keys import examples, reference
from triptych.kernels.product_keys import torch as fast

__all__ = ["product_key_topk", "rank_one_experts"]

ACTIVATIONS = ("gelu", "silu", "relu")
"""What stands between the two vectors of an expert; gelu in the tanh approximation."""


@operator()
def product_key_topk(
    queries: Tensor, keys: Tensor, top_k: int, *, form: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k best of n * n experts for each query (product keys, arXiv 1907.05242; PEER, arXiv 2407.04153).

    queries: (N, H, D), D even. keys: (H, 2, n, D/2). Expert i * n + j scores <first half, keys[h, 0, i]> plus
    <second half, keys[h, 1, j]>, in fp32 at least. Returns scores (N, H, k) in fp32 (fp64), largest first,
    and experts int64 (N, H, k). It is exact: the best of all sums are among the sums of the best of each
    half. Gradients go through the scores, the same on every run. Saves its inputs and the experts.
    Raises ValueError for shapes that do not fit and for top_k outside 1 .. n * n.
    """
    if queries.dim() != 3 or keys.dim() != 4 or keys.shape[1] != 2 or keys.shape[0] != queries.shape[1]:
        raise ValueError(
            f"product_key_topk: queries must be (N, H, D) and keys (H, 2, n, D/2); they are "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if queries.shape[2] != 2 * keys.shape[3]:
        raise ValueError(
            f"product_key_topk: keys have {keys.shape[3]} channels, which must be half of the queries' "
            f"{queries.shape[2]}"
        )
    experts = keys.shape[2] ** 2
    if not 1 <= top_k <= experts:
        raise ValueError(f"product_key_topk: top_k={top_k} must lie in 1 .. {experts}, the number of experts")
    return dispatch.choose("product_key_topk", form, queries.device).run(queries, keys, top_k)


@operator(integers=("experts",))
def rank_one_experts(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    experts: Tensor,
    weights: Tensor,
    *,
    activation: str = "gelu",
    form: str | None = None,
) -> Tensor:
    """y[n] = sum_j weights[n, j] act(<x[n], down[e]>) up[e] with e = experts[n, j] (PEER, arXiv 2407.04153).

    x: (N, C). down: (E, C). up: (E, C) or of any other width. experts: int64 (N, ...), 0 .. E - 1. weights:
    of the experts' shape, any float dtype. activation: gelu (tanh approximation), silu or relu. Returns
    (N, channels of up) of x's dtype. Works in the common dtype of x and the tables, sums in fp32 at least.
    No expert's vector is copied for a token, forward or backward: nothing of size (N, J, C) is ever made.
    Saves its inputs and (N, J) numbers. Gradients of the tables add up the tokens in their order, the same on
    every run. Raises ValueError for what does not fit.
    """
    if x.dim() != 2 or down.dim() != 2 or up.dim() != 2 or down.shape != (up.shape[0], x.shape[1]):
        raise ValueError(
            f"rank_one_experts: x must be (N, C), down (E, C), up (E, channels); they are {tuple(x.shape)}, "
            f"{tuple(down.shape)} and {tuple(up.shape)}"
        )
    if experts.shape != weights.shape or experts.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"rank_one_experts: experts {tuple(experts.shape)} and weights {tuple(weights.shape)} must have "
            f"one shape, ({x.shape[0]}, ...)"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"rank_one_experts: activation={activation!r} does not exist; use one of {ACTIVATIONS}"
        )
    run = dispatch.choose("rank_one_experts", form, x.device).run
    return run(x, down, up, experts.flatten(1), weights.flatten(1), activation)


dispatch.register("product_key_topk", dispatch.Form("torch", fast.product_key_topk))
dispatch.register("product_key_topk", dispatch.Form("reference", reference.product_key_topk))
dispatch.register("rank_one_experts", dispatch.Form("torch", fast.rank_one_experts))
dispatch.register("rank_one_experts", dispatch.Form("reference", reference.rank_one_experts))
dispatch.register_examples("product_key_topk", product_key_topk, {"retrieval": examples.retrieval})
dispatch.register_examples("rank_one_experts", rank_one_experts, {"experts": examples.experts})
