"""The logits of a chunk in Triton: one kernel reads them, another turns them into their gradient in place.

One program per token (row of V logits), which goes over the row in blocks with a running maximum and sum
(online softmax, arXiv 1805.02867). Products are PyTorch's, of which the logits leave in fp32; the gradient in
half precision takes the first half of its row's own bytes, so that a chunk costs 4 bytes per logit, no more.

x logits, s = c tanh(x / c), t target (-1: none); m running maximum, total running sum of e^(s - m),
lse = m + log total.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.linear_cross_entropy.operators import operators
from triptych.kernels.triton_launch import accumulator, launch, power_of_2

BLOCK, NUM_WARPS = 8192, 16


@triton.jit
def capped(x, softcap, CAP: tl.constexpr):
    """c tanh(x / c), by an exponential that cannot overflow."""
    if CAP:
        e = tl.exp(-2 * tl.abs(x) / softcap)
        s = softcap * (1 - e) / (1 + e)
        x = tl.where(x < 0, -s, s)
    return x


@triton.jit
def row_statistics(
    x, target, softcap, LENGTH: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """lse of the row at x, and the logit of its target, 0 without one."""
    picked = tl.load(x + target, mask=target >= 0, other=0.0).to(ACC)
    m = tl.full([], float("-inf"), ACC)
    total = tl.zeros([], ACC)
    for start in range(0, LENGTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = capped(tl.load(x + at, mask=at < LENGTH, other=0.0).to(ACC), softcap, CAP)
        s = tl.where(at < LENGTH, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        total = total * tl.exp(m - top) + tl.sum(tl.exp(s - top), 0)
        m = top
    return m + tl.log(total), capped(picked, softcap, CAP)


@triton.jit
def row_gradient(
    x, out, target, lse, dlse, dpicked, softcap,
    LENGTH: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (dlse e^(s - lse) + dpicked [v = t]) (1 - (s / c)^2).

    out may begin where x does if its elements are not wider: block i is written over blocks of x up to i,
    which all threads have read by then.
    """
    for start in range(0, LENGTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = capped(tl.load(x + at, mask=at < LENGTH, other=float("-inf")).to(ACC), softcap, CAP)
        gradient = dlse * tl.exp(s - lse) + tl.where(at == target, dpicked, 0.0)
        if CAP:
            gradient *= 1 - s / softcap * (s / softcap)
        tl.debug_barrier()
        tl.store(out + at, gradient.to(out.dtype.element_ty), mask=at < LENGTH)


@triton.jit
def statistics_kernel(
    logits, targets, lse_out, picked_out, stride, softcap,
    LENGTH: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    lse, picked = row_statistics(logits + row * stride, target, softcap, LENGTH, CAP, ACC, BLOCK)
    tl.store(lse_out + row, lse)
    tl.store(picked_out + row, tl.where(target >= 0, picked, 0.0))


@triton.jit
def gradient_kernel(
    logits, out, targets, lse_in, dlse_in, dpicked_in, stride, out_stride, softcap,
    LENGTH: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lse, dlse, dpicked = tl.load(lse_in + row), tl.load(dlse_in + row), tl.load(dpicked_in + row)
    target = tl.load(targets + row)
    x, y = logits + row * stride, out + row * out_stride
    row_gradient(x, y, target, lse, dlse, dpicked, softcap, LENGTH, CAP, ACC, BLOCK)


@triton.jit
def loss_and_gradient_kernel(
    logits, out, targets, nll_out, lse_out, stride, out_stride, softcap, z_loss,
    LENGTH: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    x, y = logits + row * stride, out + row * out_stride
    lse, picked = row_statistics(x, target, softcap, LENGTH, CAP, ACC, BLOCK)
    tl.store(lse_out + row, lse)
    tl.store(nll_out + row, tl.where(target >= 0, lse - picked + z_loss * lse * lse, 0.0))
    dlse = tl.where(target >= 0, 1 + 2 * z_loss * lse, 0.0)
    # The barriers in it also keep the target's logit until all threads have read it.
    row_gradient(x, y, target, lse, dlse, -1.0, softcap, LENGTH, CAP, ACC, BLOCK)


def _constants(logits: Tensor, softcap: float) -> dict[str, Any]:
    block = min(BLOCK, power_of_2(logits.shape[1]))
    warps = max(1, NUM_WARPS * block // BLOCK)
    return {
        "LENGTH": logits.shape[1],
        "CAP": softcap != 0,
        "ACC": accumulator(logits.dtype),
        "BLOCK": block,
        "num_warps": warps,
    }


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, V) of dtype whose rows begin where those of logits do."""
    return logits.view(dtype)[:, : logits.shape[1]]


class TritonRows:
    """`operators.Rows`; logits have contiguous rows."""

    def statistics(self, logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
        """As in `operators.Rows`."""
        lse = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
        picked = torch.empty_like(lse)
        sizes = (logits.stride(0), softcap)
        arguments = (logits, targets, lse, picked, *sizes)
        launch(statistics_kernel, lse.shape, *arguments, **_constants(logits, softcap))
        return lse, picked

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        dlse: Tensor,
        dpicked: Tensor,
        softcap: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """As in `operators.Rows`, over the logits."""
        out = _over(logits, dtype)
        sizes = (logits.stride(0), out.stride(0), softcap)
        of_rows = (lse, dlse.contiguous(), dpicked.contiguous())
        launch(
            gradient_kernel, lse.shape, logits, out, targets, *of_rows, *sizes, **_constants(logits, softcap)
        )
        return out

    def loss_and_gradient(
        self, logits: Tensor, targets: Tensor, z_loss: float, softcap: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `operators.Rows`, the gradient over the logits."""
        nll = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
        lse, out = torch.empty_like(nll), _over(logits, dtype)
        sizes = (logits.stride(0), out.stride(0), softcap, z_loss)
        arguments = (logits, out, targets, nll, lse, *sizes)
        launch(loss_and_gradient_kernel, nll.shape, *arguments, **_constants(logits, softcap))
        return nll, lse, out


linear_cross_entropy = operators("_triton", TritonRows())
