"""Projection and log-sum-exp in one operator that holds the logits of one chunk of tokens at a time.

N tokens, D hidden size, V vocabulary rows held, starting at global row `start`. Backward computes each
chunk's logits again from the saved inputs and the log-sum-exp.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype

# Logits held at once, in elements: 16 MiB of fp32.
CHUNK_ELEMENTS = 1 << 22


def _chunks(tokens: int, vocab: int, chunk_size: int) -> Iterator[slice]:
    size = chunk_size or max(1, CHUNK_ELEMENTS // vocab)
    return (slice(i, min(i + size, tokens)) for i in range(0, tokens, size))


def _matmul(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a @ b in out_dtype; on CUDA half-precision products keep the fp32 accumulator."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=out_dtype)
    return torch.mm(a, b).to(out_dtype)


def _local(targets: Tensor, start: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Row of each target within the shard (0 where it is not held) and whether it is held."""
    local = targets - start
    held = (local >= 0) & (local < vocab)
    return local.where(held, 0), held


@define("linear_logsumexp")
def linear_logsumexp_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, chunk_size: int, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (N,) of hidden @ weight.T and the target's logit (N,), 0 where the target is not held."""
    dtype = statistics_dtype(hidden, weight)
    weight_t = weight.to(matmul_dtype).T
    rows, held = _local(targets, start, weight.shape[0])
    lse = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
    picked = torch.empty_like(lse)
    for chunk in _chunks(hidden.shape[0], weight.shape[0], chunk_size):
        logits = _matmul(hidden[chunk].to(matmul_dtype), weight_t, dtype)
        picked[chunk] = logits.gather(1, rows[chunk].unsqueeze(1)).squeeze(1)
        top = logits.amax(-1, keepdim=True)
        lse[chunk] = logits.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(-1))
    return lse, picked.mul_(held)


@linear_logsumexp_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, chunk_size: int, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    lse = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden, weight))
    return lse, torch.empty_like(lse)


@define("linear_logsumexp_backward")
def linear_logsumexp_backward_op(
    dlse: Tensor,
    dpicked: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    start: int,
    chunk_size: int,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dhidden and dweight; dlogits = dlse * softmax + dpicked at the target."""
    dtype = lse.dtype
    cast = weight.to(matmul_dtype)
    rows, held = _local(targets, start, weight.shape[0])
    dpicked = dpicked * held
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    for chunk in _chunks(hidden.shape[0], weight.shape[0], chunk_size):
        h = hidden[chunk].to(matmul_dtype)
        dlogits = (
            _matmul(h, cast.T, dtype).sub_(lse[chunk].unsqueeze(-1)).exp_().mul_(dlse[chunk].unsqueeze(-1))
        )
        dlogits.scatter_add_(1, rows[chunk].unsqueeze(1), dpicked[chunk].unsqueeze(1))
        dlogits = dlogits.to(matmul_dtype)
        dhidden[chunk] = dlogits @ cast
        if matmul_dtype == dtype:
            dweight.addmm_(dlogits.T, h)
        else:
            dweight += _matmul(dlogits.T, h, dtype)
    return dhidden, dweight.to(weight.dtype)


@linear_logsumexp_backward_op.register_fake
def _(
    dlse: Tensor,
    dpicked: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    start: int,
    chunk_size: int,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, output[0])


def _backward(ctx: Any, dlse: Tensor, dpicked: Tensor) -> tuple[Any, ...]:
    hidden, weight, targets, lse = ctx.saved_tensors
    dhidden, dweight = linear_logsumexp_backward_op(dlse, dpicked, lse, hidden, weight, targets, *ctx.options)
    return dhidden, dweight, None, None, None, None


linear_logsumexp_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("linear_logsumexp")
def _flops(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@flop_formula("linear_logsumexp_backward")
def _flops_backward(
    dlse: Any, dpicked: Any, lse: Any, hidden: Any, weight: Any, *args: Any, **kwargs: Any
) -> int:
    # The logits once more, dhidden and dweight.
    return 3 * _flops(hidden, weight)


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    start: int,
    chunk_size: int | None,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the reference."""
    return linear_logsumexp_op(hidden, weight, targets, start, chunk_size or 0, matmul_dtype)
