"""WKV in Triton: two sweeps, token by token, and all else for every token at once. Saves its inputs.

B batch, T length, C channels. Mathematics: triton_kernels.py.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.triton_launch import accumulator, launch
from triptych.kernels.wkv.torch import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, wkv_by
from triptych.kernels.wkv.triton_kernels import gradient_kernel, output_kernel, sweep_kernel

SWEEP_CHANNELS = 32
"""Channels of a sweep's program, a single warp: few, since there are only rows and channels to share out."""
BLOCK_T, BLOCK_C = 16, 64


def _sweep(
    log: Tensor,
    a: Tensor,
    b: Tensor | None,
    w: Tensor,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    first: Tensor | None,
    directions: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sums before each token (directions, 3, B, T, C), and over all of them in the first direction (3, B, C).

    b: None for a sweep of the inputs, with a and ones; else one of the outputs, with a and a b.
    """
    batch, length, channels = log.shape
    sums = log.new_empty(directions, 3, batch, length, channels, dtype=dtype)
    last = log.new_empty(3, batch, channels, dtype=dtype)
    launch(
        sweep_kernel, (batch, -(-channels // SWEEP_CHANNELS), directions),
        log, a, b, w, scale, starts, ends, first, sums, last, batch, length, channels,
        INPUTS=b is None, PACKED=starts is not None, SCALED=scale is not None, HAS_FIRST=first is not None,
        BLOCK_C=SWEEP_CHANNELS, ACC=accumulator(dtype), num_warps=1,
    )  # fmt: skip
    return sums, last


class _Call:
    """The arguments of a call as the kernels take them, and its forward pass."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        u: Tensor,
        initial_state: Tensor | None,
        scale: Tensor | None,
        starts: Tensor | None,
        ends: Tensor | None,
        scale_u: bool,
        bidirectional: bool,
    ) -> None:
        self.dtype = statistics_dtype(k, v, w)
        self.k, self.v, self.w, self.u = (x.contiguous() for x in (k, v, w, u))
        self.scale = None if scale is None else scale.contiguous()
        self.starts, self.ends = (
            None if x is None else x.contiguous().view(torch.uint8) for x in (starts, ends)
        )
        self.directions = 2 if bidirectional else 1
        self.constants = {
            "DIRECTIONS": self.directions,
            "SCALED": scale is not None,
            "SCALE_U": scale_u and scale is not None,
            "BLOCK_T": BLOCK_T,
            "BLOCK_C": BLOCK_C,
            "ACC": accumulator(self.dtype),
        }
        self.first = None
        if initial_state is not None:
            mean, log = initial_state.to(self.dtype).unbind(1)
            self.first = torch.stack([log, mean, torch.ones_like(mean)])
        self.sums, self.last = self.sweep(self.k, self.v, None, self.first)

    def sweep(self, log: Tensor, a: Tensor, b: Tensor | None, first: Tensor | None) -> tuple[Tensor, Tensor]:
        return _sweep(
            log, a, b, self.w, self.scale, self.starts, self.ends, first, self.directions, self.dtype
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of tokens and of channels."""
        batch, length, channels = self.k.shape
        return -(-batch * length // BLOCK_T), -(-channels // BLOCK_C)

    def outputs(self, y_dtype: torch.dtype, keep_log: bool) -> tuple[Tensor, Tensor]:
        """y, and the logarithm of its denominator where it is to be kept."""
        batch, length, channels = self.k.shape
        y = self.k.new_empty(self.k.shape, dtype=y_dtype)
        log = self.k.new_empty(self.k.shape if keep_log else 0, dtype=self.dtype)
        launch(
            output_kernel, self.grid,
            self.k, self.v, self.u, self.scale, self.sums, y, log, batch * length, channels,
            KEEP_LOG=keep_log, **self.constants,
        )  # fmt: skip
        return y, log

    def final_state(self) -> Tensor:
        """(B, 2, C)."""
        top, total, weight = self.last.unbind(0)
        return torch.stack([total / weight, top + weight.log()], 1)


@define("wkv_triton")
def wkv_op(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """As triptych::wkv; chunk_size has no meaning here."""
    call = _Call(k, v, w, u, initial_state, scale, starts, ends, scale_u, bidirectional)
    y, _ = call.outputs(v.dtype, keep_log=False)
    return y, k.new_empty(0, 2, k.shape[2], dtype=call.dtype) if bidirectional else call.final_state()


@wkv_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    count = 0 if bidirectional else k.shape[0]
    return v.new_empty(v.shape), k.new_empty(count, 2, k.shape[2], dtype=statistics_dtype(k, v, w))


@define("wkv_triton_backward")
def wkv_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial state (empty where bidirectional)."""
    call = _Call(k, v, w, u, initial_state, scale, starts, ends, scale_u, bidirectional)
    dy = dy.contiguous()
    y, log = call.outputs(call.dtype, keep_log=True)
    first = None
    if dfinal is not None:
        mean, final_log = call.final_state().unbind(1)
        dmean, dlog = dfinal.to(call.dtype).unbind(1)
        first = torch.stack([-final_log, dmean, dmean * mean - dlog])
    adjoints, last = call.sweep(log, dy, y, first)
    batch, length, channels = k.shape
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    sums = k.new_empty(call.grid[0], 2, channels, dtype=call.dtype)
    launch(
        gradient_kernel, call.grid,
        dy, call.k, call.v, call.w, call.u, call.scale, y, log, call.sums, adjoints, dk, dv, sums,
        batch * length, channels,
        **call.constants,
    )  # fmt: skip
    dw, du = sums.sum(0)
    dstate = k.new_zeros(0 if bidirectional else batch, 2, channels, dtype=call.dtype)
    if call.first is not None:
        (initial_log, mean, _), (top, of_dy, of_dy_y) = call.first, last
        weight = (initial_log + top).exp()
        dmean = weight * of_dy
        dstate = torch.stack([dmean, mean * dmean - weight * of_dy_y], 1)
    return dk, dv, dw.to(w.dtype, copy=True), du.to(u.dtype, copy=True), dstate


@wkv_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    scale: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    scale_u: bool,
    bidirectional: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = 0 if bidirectional else k.shape[0]
    dstate = k.new_empty(count, 2, k.shape[2], dtype=statistics_dtype(k, v, w))
    dk, dv, dw, du = (x.new_empty(x.shape) for x in (k, v, w, u))
    return dk, dv, dw, du, dstate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale_u, ctx.bidirectional, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    initial_state = tensors[4]
    if dy is None:
        dy = torch.zeros_like(tensors[1])
    if ctx.bidirectional:
        dfinal = None
    *grads, dstate = wkv_backward_op(dy, dfinal, *tensors, ctx.scale_u, ctx.bidirectional, ctx.chunk_size)
    dinitial = None if initial_state is None else dstate.to(initial_state.dtype)
    return *grads, dinitial, None, None, None, None, None, None


wkv_op.register_autograd(_backward, setup_context=_setup)


def _flops(products: int, k: Any, bidirectional: bool) -> int:
    return 2 * products * (2 if bidirectional else 1) * k[0] * k[1] * k[2]


@flop_formula("wkv_triton")
def _flops_forward(k: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(FORWARD_PRODUCTS, k, args[-2])


@flop_formula("wkv_triton_backward")
def _flops_backward(dy: Any, dfinal: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(BACKWARD_PRODUCTS, k, args[-2])


wkv = functools.partial(wkv_by, wkv_op)
