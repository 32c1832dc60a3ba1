"""Dropout whose mask is a function of (sample key, element), as one operator that saves a 1-byte mask.

B samples; start and shape describe the window that x is of the whole per-sample tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define
from triptych.kernels.random import hash_bits


def window_index(
    window: Sequence[int], start: Sequence[int], shape: Sequence[int], device: torch.device
) -> Tensor:
    """int64 of shape `window`: where each of its elements lies in the flattened whole tensor."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for size, offset, whole in zip(reversed(window), reversed(start), reversed(shape)):
        line = torch.arange(offset, offset + size, device=device).mul_(stride)
        index = line.reshape(-1, *[1] * index.dim()) + index
        stride *= whole
    return index


@define("dropout")
def dropout_op(
    x: Tensor, p: float, keys: Tensor, start: Sequence[int], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x with each element dropped with probability p, and the mask (bool) of what was kept."""
    index = window_index(x.shape[1:], start, shape, x.device)
    # The top 53 bits as an integer, compared with p in units of 2^-53.
    threshold = round(p * 2**53)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    # One sample at a time: the int64 work is eight bytes an element.
    for b in range(x.shape[0]):
        bits = hash_bits(keys[b], index)
        mask[b] = bits.bitwise_right_shift_(11).bitwise_and_(2**53 - 1) >= threshold
    return (x.contiguous() * mask).mul_(1.0 / (1.0 - p)), mask


@dropout_op.register_fake
def _(x: Tensor, p: float, keys: Tensor, start: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.p = inputs[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    (mask,) = ctx.saved_tensors
    dx = None if dy is None else (dy * mask).mul_(1.0 / (1.0 - ctx.p))
    return dx, None, None, None, None


dropout_op.register_autograd(_backward, setup_context=_setup)
