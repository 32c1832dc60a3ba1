"""The chunks, the custom ops and their gradients, for whatever works on the logits of a chunk.

N tokens, D hidden size, V vocabulary rows held, starting at global row `start`; softcap c:

    x = hidden weight^T,  s = c tanh(x / c) (x itself without c),  lse = log sum_v e^s,  picked = s[target]
    nll = lse - picked + z lse^2
    dx = (dlse e^(s - lse) + dpicked [v = target]) (1 - (s / c)^2)

Logits exist for one chunk of tokens at a time. Two ways lead to the gradients:

- ahead: nll and its gradients in one go over the logits, three matrix products in all. A token's row of
  dhidden only has to be scaled by the token's cotangent later. dweight is a sum over tokens: it is right, but
  for a factor, where all tokens that count have the same cotangent, as under any sum or mean. Backward looks
  whether they have, and otherwise computes it again. What is kept is dhidden (N, D) and dweight (V, D).
- again: lse and picked, from which backward computes the logits of each chunk again; four products. Nothing
  but these two numbers per token is kept. Shards of a vocabulary go this way, as they know lse only together.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.linear_cross_entropy.shards import VocabShards, combine

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits held at once, at least: 16 MiB of fp32 on the CPU, 256 MiB on a GPU."""


class Rows(Protocol):
    """What is done to the logits of a chunk: (n, V), of fp32 or fp64, which may be overwritten.

    targets: (n,), rows of the vocabulary held here, -1 for none. softcap: 0.0 for none.
    """

    def statistics(self, logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
        """lse and picked (n,); picked is 0 without target."""

    def gradient(
        self, logits: Tensor, targets: Tensor, lse: Tensor, dlse: Tensor, dpicked: Tensor,
        softcap: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """dlogits (n, V) of dtype, from the cotangents of lse and picked (n,)."""

    def loss_and_gradient(
        self, logits: Tensor, targets: Tensor, z_loss: float, softcap: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """nll (n,), lse (n,) and the gradient of the sum of nll, (n, V) of dtype; 0 without target."""


def _chunks(hidden: Tensor, vocab: int, chunk_size: int) -> Iterator[slice]:
    tokens, size = hidden.shape[0], chunk_size or default_chunk_size(hidden, vocab)
    return (slice(i, min(i + size, tokens)) for i in range(0, tokens, size))


def default_chunk_size(hidden: Tensor, vocab: int) -> int:
    """Tokens whose logits exist at a time.

    Each chunk reads the weight and adds to its gradient once more, which must be little beside the chunk's
    products; D tokens have logits of as many bytes as that gradient.
    """
    at_least = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // vocab
    return max(1, hidden.shape[1], at_least)


def _space(hidden: Tensor, vocab: int, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """Where the logits of one chunk after the other go."""
    tokens = min(hidden.shape[0], chunk_size or default_chunk_size(hidden, vocab))
    return torch.empty(tokens, vocab, dtype=dtype, device=hidden.device)


def _wide_product(a: Tensor, b: Tensor) -> bool:
    """Whether products of half precision can leave their fp32 accumulator as it is."""
    return a.is_cuda and a.dtype in (torch.float16, torch.bfloat16)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if _wide_product(a, b):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _wide_product(a, b):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def _local(targets: Tensor, start: int, vocab: int) -> Tensor:
    """Row of each target within the shard, -1 where it is not held."""
    local = targets - start
    return local.where((local >= 0) & (local < vocab), -1)


def uniform(cotangent: Tensor, counted: Tensor) -> Tensor | None:
    """The cotangent that all counted tokens have in common, or None. An accelerator is waited for."""
    smallest = cotangent.masked_fill(~counted, torch.inf).amin()
    same = smallest == cotangent.masked_fill(~counted, -torch.inf).amax()
    return smallest if bool(same) else None


Losses = Callable[..., Tensor]


def operators(suffix: str, rows: Rows) -> Losses:
    """Register the ops `linear_logsumexp<suffix>` and `linear_cross_entropy<suffix>` with their backward ops.

    Returns the form of the public function that uses them.
    """
    logsumexp_name, loss_name = f"linear_logsumexp{suffix}", f"linear_cross_entropy{suffix}"

    @define(logsumexp_name)
    def logsumexp_op(
        hidden: Tensor, weight: Tensor, targets: Tensor, start: int, chunk_size: int,
        matmul_dtype: torch.dtype, softcap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """lse (N,) and picked (N,), 0 where the target is not held."""
        vocab, dtype = weight.shape[0], statistics_dtype(hidden, weight)
        weight_t, local = weight.to(matmul_dtype).T, _local(targets, start, vocab)
        lse = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        picked = torch.empty_like(lse)
        space = _space(hidden, vocab, chunk_size, dtype)
        for chunk in _chunks(hidden, vocab, chunk_size):
            h = hidden[chunk].to(matmul_dtype)
            logits = _multiply(h, weight_t, space[: h.shape[0]])
            lse[chunk], picked[chunk] = rows.statistics(logits, local[chunk], softcap)
        return lse, picked

    @logsumexp_op.register_fake
    def _(
        hidden: Tensor, weight: Tensor, targets: Tensor, start: int, chunk_size: int,
        matmul_dtype: torch.dtype, softcap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        lse = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden, weight))
        return lse, torch.empty_like(lse)

    @define(f"{logsumexp_name}_backward")
    def logsumexp_backward_op(
        dlse: Tensor, dpicked: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor,
        start: int, chunk_size: int, matmul_dtype: torch.dtype, softcap: float, with_dhidden: bool,
        with_dweight: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """dhidden and dweight, each empty unless wanted."""
        vocab, dtype = weight.shape[0], lse.dtype
        cast, local = weight.to(matmul_dtype), _local(targets, start, vocab)
        dhidden = hidden.new_empty(hidden.shape if with_dhidden else 0)
        dweight = weight.new_zeros(weight.shape if with_dweight else 0, dtype=dtype)

        def work_on(chunk: slice, space: Tensor) -> None:
            h = hidden[chunk].to(matmul_dtype)
            logits = _multiply(h, cast.T, space[: h.shape[0]])
            dlogits = rows.gradient(
                logits, local[chunk], lse[chunk], dlse[chunk], dpicked[chunk], softcap, matmul_dtype
            )
            if with_dhidden:
                dhidden[chunk] = dlogits @ cast
            if with_dweight:
                _add_product(dweight, dlogits.T, h)

        space = _space(hidden, vocab, chunk_size, dtype)
        for chunk in _chunks(hidden, vocab, chunk_size):
            work_on(chunk, space)
        # Before dweight is copied to another dtype.
        del space
        return dhidden, dweight.to(weight.dtype)

    @logsumexp_backward_op.register_fake
    def _(
        dlse: Tensor, dpicked: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor,
        start: int, chunk_size: int, matmul_dtype: torch.dtype, softcap: float, with_dhidden: bool,
        with_dweight: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dhidden = hidden.new_empty(hidden.shape if with_dhidden else 0)
        return dhidden, weight.new_empty(weight.shape if with_dweight else 0)

    def setup_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, targets, *ctx.options = inputs
        ctx.save_for_backward(hidden, weight, targets, output[0])

    def backward_logsumexp(ctx: Any, dlse: Tensor, dpicked: Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        found = logsumexp_backward_op(dlse, dpicked, lse, hidden, weight, targets, *ctx.options, *wanted)
        gradients = (gradient if one else None for gradient, one in zip(found, wanted, strict=True))
        return *gradients, None, None, None, None, None

    logsumexp_op.register_autograd(backward_logsumexp, setup_context=setup_logsumexp)

    @define(loss_name)
    def loss_op(
        hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, matmul_dtype: torch.dtype,
        softcap: float, z_loss: float, with_dweight: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """nll and lse (N,), and the gradients of the sum of nll: dhidden and dweight (empty unless wanted).

        A target of -1 is that of a token which does not count. dweight is as wide as lse: a sum over tokens
        that nothing has scaled yet may be too large for fp16.
        """
        vocab, dtype = weight.shape[0], statistics_dtype(hidden, weight)
        cast = weight.to(matmul_dtype)
        nll = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        lse = torch.empty_like(nll)
        dhidden = hidden.new_empty(hidden.shape)
        dweight = weight.new_zeros(weight.shape if with_dweight else 0, dtype=dtype)
        space = _space(hidden, vocab, chunk_size, dtype)
        for chunk in _chunks(hidden, vocab, chunk_size):
            h = hidden[chunk].to(matmul_dtype)
            logits = _multiply(h, cast.T, space[: h.shape[0]])
            nll[chunk], lse[chunk], dlogits = rows.loss_and_gradient(
                logits, targets[chunk], z_loss, softcap, matmul_dtype
            )
            dhidden[chunk] = dlogits @ cast
            if with_dweight:
                _add_product(dweight, dlogits.T, h)
        return nll, lse, dhidden, dweight

    @loss_op.register_fake
    def _(
        hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, matmul_dtype: torch.dtype,
        softcap: float, z_loss: float, with_dweight: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        nll = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden, weight))
        dweight = weight.new_empty(weight.shape if with_dweight else 0, dtype=nll.dtype)
        return nll, torch.empty_like(nll), hidden.new_empty(hidden.shape), dweight

    @define(f"{loss_name}_backward")
    def loss_backward_op(
        dnll: Tensor, lse: Tensor, dhidden: Tensor, dweight: Tensor, hidden: Tensor, weight: Tensor,
        targets: Tensor, chunk_size: int, matmul_dtype: torch.dtype, softcap: float, z_loss: float,
        with_dweight: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """dhidden and dweight (empty unless wanted): those of the sum of nll under nll's cotangent."""
        counted = targets >= 0
        dnll = dnll.where(counted, 0)
        scaled = (dhidden * dnll.unsqueeze(1)).to(hidden.dtype)
        if not with_dweight:
            return scaled, weight.new_empty(0)
        if dnll.numel() and (factor := uniform(dnll, counted)) is not None:
            return scaled, torch.mul(dweight, factor, out=weight.new_empty(weight.shape))
        dlse = dnll * (1 + 2 * z_loss * lse)
        options = (0, chunk_size, matmul_dtype, softcap, False, True)
        return scaled, logsumexp_backward_op(dlse, -dnll, lse, hidden, weight, targets, *options)[1]

    @loss_backward_op.register_fake
    def _(
        dnll: Tensor, lse: Tensor, dhidden: Tensor, dweight: Tensor, hidden: Tensor, weight: Tensor,
        targets: Tensor, chunk_size: int, matmul_dtype: torch.dtype, softcap: float, z_loss: float,
        with_dweight: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape if with_dweight else 0)

    def setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], hidden, weight, targets)

    def backward_loss(ctx: Any, dnll: Tensor | None, *_: Any) -> tuple[Any, ...]:
        nothing = (None,) * 6
        if dnll is None:
            return None, None, *nothing
        dhidden, dweight = loss_backward_op(dnll, *ctx.saved_tensors, *ctx.options)
        return dhidden, dweight if ctx.options[-1] else None, *nothing

    loss_op.register_autograd(backward_loss, setup_context=setup_loss)

    @flop_formula(logsumexp_name)
    def logits_flops(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * hidden[0] * hidden[1] * weight[0]

    @flop_formula(f"{logsumexp_name}_backward")
    def _(dlse: Any, dpicked: Any, lse: Any, hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        # The logits once more, dhidden and dweight.
        return (1 + sum(args[-2:])) * logits_flops(hidden, weight)

    @flop_formula(loss_name)
    def _(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return (3 if args[-1] else 2) * logits_flops(hidden, weight)

    def losses(
        hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_size: int | None, softcap: float | None,
        z_loss: float, shards: VocabShards | None, matmul_dtype: torch.dtype, recompute: bool,
    ) -> Tensor:  # fmt: skip
        """Shapes as in the reference."""
        size, cap = chunk_size or 0, softcap or 0.0
        differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        if differentiable and shards is None and not recompute:
            options = (size, matmul_dtype, cap, z_loss, weight.requires_grad)
            return loss_op(hidden, weight, targets, *options)[0]
        start = 0 if shards is None else shards.start
        lse, picked = logsumexp_op(hidden, weight, targets, start, size, matmul_dtype, cap)
        return combine(lse, picked, targets >= 0, z_loss, shards)

    return losses
