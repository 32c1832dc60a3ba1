"""Causal convolution with long kernels by PyTorch's FFT, as a registered operator that saves its inputs.

B batch, T length, C channels, K taps, n points of a transform. With ^ for the transform along time, and n so
large that nothing comes round to where it is looked at (n >= T + K - 1):

    y = ifft(kernel^ x^),    dx = ifft(conj(kernel^) dy^),    dkernel = ifft(sum over rows of conj(x^) dy^)

Packed documents of about the same length are transformed together, each in a row of its own, with one
transform of the kernel: as many points as they need, and not as the whole row would.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.segments import document_bounds

# Points of the transforms in one go: bounds their memory, and keeps them in a CPU's cache.
TILE_ELEMENTS = {"cpu": 1 << 19}
TILE_ELEMENTS_ELSEWHERE = 1 << 27
FEWEST_CHANNELS = 8


@functools.lru_cache(maxsize=256)
def points(least: int) -> int:
    """The smallest even 2^a 3^b 5^c that is not below `least`: sizes that FFT libraries are fast at."""
    best = 2 * (1 << max(0, (least - 1).bit_length()))
    for b, c in itertools.product(range(least.bit_length()), repeat=2):
        odd = 3**b * 5**c
        if odd < best:
            best = min(best, odd * 2 ** max(1, math.ceil(math.log2(least / odd))))
    return best


@dataclass(frozen=True)
class Rows:
    """Documents that are transformed together, one to a row of `length` tokens.

    tokens: where their tokens are in the batch; slots: where in the rows. Both None: the rows as they are.
    """

    count: int
    length: int
    tokens: Tensor | None
    slots: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (C, rows, length)."""
        if self.tokens is not None and self.slots is not None:
            rows = x.new_zeros(self.count * self.length, x.shape[2])
            x = rows.index_copy_(0, self.slots, x.reshape(-1, x.shape[2]).index_select(0, self.tokens))
        return x.view(self.count, self.length, -1).permute(2, 0, 1).contiguous()

    def put(self, y: Tensor, into: Tensor) -> None:
        """(C, rows, length) into their places in (B, T, C)."""
        y = y.permute(1, 2, 0)
        if self.tokens is None or self.slots is None:
            into.copy_(y)
        else:
            of_tokens = y.reshape(-1, y.shape[2]).index_select(0, self.slots).to(into.dtype)
            into.view(-1, into.shape[2]).index_copy_(0, self.tokens, of_tokens)


def _size_class(length: int) -> int:
    """The smallest 2^a or 3 2^a that is not below a length."""
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if power >= 4 and length <= power * 3 // 4 else power


def _groups(x: Tensor, cu_seqlens: Tensor | None) -> list[Rows]:
    if cu_seqlens is None:
        return [Rows(x.shape[0], x.shape[1], None, None)]
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, end in document_bounds(cu_seqlens):
        by_size.setdefault(_size_class(end - start), []).append((start, end))
    groups = []
    for documents in by_size.values():
        longest = max(end - start for start, end in documents)
        tokens = torch.cat([torch.arange(*document, device="cpu") for document in documents])
        slots = torch.cat(
            [
                torch.arange(row * longest, row * longest + end - start, device="cpu")
                for row, (start, end) in enumerate(documents)
            ]
        )
        groups.append(Rows(len(documents), longest, tokens.to(x.device), slots.to(x.device)))
    return groups


def _tiles(x: Tensor, rows: Rows, size: int) -> Iterator[slice]:
    """Channels that are transformed in one go."""
    limit = TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS_ELSEWHERE)
    width = max(FEWEST_CHANNELS, limit // (rows.count * size))
    for first in range(0, x.shape[2], width):
        yield slice(first, first + width)


@define("long_conv")
def long_conv_op(x: Tensor, kernel: Tensor, d: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """y (B, T, C)."""
    dtype = statistics_dtype(x, kernel)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in _groups(x, cu_seqlens):
        taps = min(kernel.shape[1], rows.length)
        size = points(rows.length + taps - 1)
        for tile in _tiles(x, rows, size):
            x_CRT = rows.take(x[..., tile].to(dtype))
            spectrum = torch.fft.rfft(x_CRT, size)
            spectrum *= torch.fft.rfft(kernel[tile, :taps].to(dtype), size).unsqueeze(1)
            y_CRT = torch.fft.irfft(spectrum, size)[..., : rows.length]
            if d is not None:
                y_CRT.addcmul_(x_CRT, d[tile].to(dtype).view(-1, 1, 1))
            rows.put(y_CRT, y[..., tile])
    return y


@long_conv_op.register_fake
def _(x: Tensor, kernel: Tensor, d: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@define("long_conv_backward")
def long_conv_backward_op(
    dy: Tensor, x: Tensor, kernel: Tensor, d: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, kernel and d (empty where there is none)."""
    dtype = statistics_dtype(x, kernel)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dkernel = torch.zeros(kernel.shape, dtype=dtype, device=x.device)
    dd = torch.zeros(0 if d is None else x.shape[2], dtype=dtype, device=x.device)
    for rows in _groups(x, cu_seqlens):
        taps = min(kernel.shape[1], rows.length)
        size = points(rows.length + taps - 1)
        for tile in _tiles(x, rows, size):
            x_CRT, dy_CRT = (rows.take(v[..., tile].to(dtype)) for v in (x, dy))
            of_dy = torch.fft.rfft(dy_CRT, size)
            # Conjugated in memory: an operator that AOTAutograd calls loses conjugate views.
            of_x = torch.fft.rfft(x_CRT, size).conj_physical_()
            of_kernel = (of_x * of_dy).sum(1)
            dkernel[tile, :taps] += torch.fft.irfft(of_kernel, size)[:, :taps]
            of_dy *= torch.fft.rfft(kernel[tile, :taps].to(dtype), size).conj_physical_().unsqueeze(1)
            dx_CRT = torch.fft.irfft(of_dy, size)[..., : rows.length]
            if d is not None:
                dd[tile] += (x_CRT * dy_CRT).sum((1, 2))
                dx_CRT.addcmul_(dy_CRT, d[tile].to(dtype).view(-1, 1, 1))
            rows.put(dx_CRT, dx[..., tile])
    return dx, dkernel.to(kernel.dtype), dd if d is None else dd.to(d.dtype)


@long_conv_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, kernel: Tensor, d: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dd = x.new_empty(0, dtype=statistics_dtype(x, kernel)) if d is None else d.new_empty(d.shape)
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape), dd


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, kernel, d, cu_seqlens = ctx.saved_tensors
    dx, dkernel, dd = long_conv_backward_op(dy, x, kernel, d, cu_seqlens)
    return dx, dkernel, None if d is None else dd, None


long_conv_op.register_autograd(_backward, setup_context=_setup)


def _work(x: Any, kernel: Any, transforms: int, products: int) -> int:
    """FLOPs of transforms of each row and of the kernel, and of products of spectra: 5/2 n log2 n of a real
    transform, 3 n of the product of two. Packed documents are counted as if each row were one."""
    batch, length, channels = x
    size = points(length + min(kernel[1], length) - 1)
    transform = 2.5 * size * math.log2(size)
    return round(channels * (transform * (transforms * batch + transforms - 1) + 3 * size * products * batch))


@flop_formula("long_conv")
def _flops(x: Any, kernel: Any, *args: Any, **kwargs: Any) -> int:
    return _work(x, kernel, transforms=2, products=1)


@flop_formula("long_conv_backward")
def _flops_backward(dy: Any, x: Any, kernel: Any, *args: Any, **kwargs: Any) -> int:
    return _work(x, kernel, transforms=3, products=2)


def long_conv(x: Tensor, kernel: Tensor, *, d: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Shapes as in the public function."""
    return long_conv_op(x, kernel, d, cu_seqlens)
