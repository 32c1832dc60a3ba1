"""Product keys and rank-one experts as operators. Letters as in the package; S = 2 H halves of queries."""

from typing import Any

from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.product_keys import rank_one, retrieval


@define("product_key_topk")
def product_key_topk_op(queries: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """scores (N, H, k) and experts (N, H, k)."""
    return retrieval.topk(queries, keys, top_k)


@product_key_topk_op.register_fake
def _(queries: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = queries.new_empty(*queries.shape[:2], top_k, dtype=statistics_dtype(queries, keys))
    return scores, scores.new_empty(scores.shape, dtype=retrieval.INDEX)


@define("product_key_topk_backward")
def product_key_topk_backward_op(
    dscores: Tensor, experts: Tensor, queries: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """dqueries and dkeys."""
    return retrieval.topk_backward(dscores, experts, queries, keys)


@product_key_topk_backward_op.register_fake
def _(dscores: Tensor, experts: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _setup_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], queries, keys)


def _backward_topk(ctx: Any, dscores: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *product_key_topk_backward_op(dscores, *ctx.saved_tensors), None


product_key_topk_op.register_autograd(_backward_topk, setup_context=_setup_topk)


@define("rank_one_experts")
def rank_one_experts_op(
    x: Tensor, down: Tensor, up: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """y (N, channels of up) and what goes into the activation (N, J)."""
    return rank_one.forward(x, down, up, experts, weights, activation)


@rank_one_experts_op.register_fake
def _(
    x: Tensor, down: Tensor, up: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], up.shape[1]), weights.new_empty(
        weights.shape, dtype=statistics_dtype(x, down, weights)
    )


@define("rank_one_experts_backward")
def rank_one_experts_backward_op(
    dy: Tensor,
    inner: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, ddown, dup, dweights."""
    return rank_one.backward(dy, inner, x, down, up, experts, weights, activation)


@rank_one_experts_backward_op.register_fake
def _(
    dy: Tensor,
    inner: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, ddown, dup, dweights = (y.new_empty(y.shape) for y in (x, down, up, weights))
    return dx, ddown, dup, dweights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 6
    dx, ddown, dup, dweights = rank_one_experts_backward_op(dy, *ctx.saved_tensors, ctx.activation)
    return dx, ddown, dup, None, dweights, None


rank_one_experts_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("product_key_topk")
def _flops_topk(queries: Any, keys: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * queries[0] * queries[1] * queries[2] * keys[2]


@flop_formula("product_key_topk_backward")
def _flops_topk_backward(
    dscores: Any, experts: Any, queries: Any, keys: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _flops_topk(queries, keys)


@flop_formula("rank_one_experts")
def _flops(x: Any, down: Any, up: Any, experts: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * experts[0] * experts[1] * (down[1] + up[1])


@flop_formula("rank_one_experts_backward")
def _flops_backward(
    dy: Any, inner: Any, x: Any, down: Any, up: Any, experts: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _flops(x, down, up, experts)


def product_key_topk(queries: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Shapes as in the public function."""
    scores, experts = product_key_topk_op(queries, keys, top_k)
    return scores, experts


def rank_one_experts(
    x: Tensor, down: Tensor, up: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """experts, weights: (N, J); otherwise as the public function."""
    return rank_one_experts_op(x, down, up, experts, weights, activation)[0]
