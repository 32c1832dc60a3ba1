"""The Triton form of SSD as a registered operator. It saves its inputs only: the states are computed again.

B batch, T length, L chunk size, K chunks in all, H heads, P head dim, G groups, N state, docs documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.ssd import triton_kernels as kernels
from triptych.kernels.ssd.chunks import VANISHED
from triptych.kernels.ssd.inputs import NO_LIMIT, rotate
from triptych.kernels.ssd.torch import products
from triptych.kernels.swiglu.triton import swiglu
from triptych.kernels.triton_launch import accumulator, dot_precision, launch, power_of_2

MAX_CHUNK = 64
"""Tokens of a chunk: what leaves registers for the gradients of b and c, gathered over heads."""
PROGRAMS = 528
"""As many as keep a GPU of 132 multiprocessors busy; heads are split, states cut, until there are as many."""


@dataclass
class Cuts:
    """How the tokens of (B, T) are cut into chunks: by rows, or by documents."""

    size: int
    count: int  # K
    per_row: int  # chunks in a row, where rows are not packed
    packed: bool
    documents: int  # rows, or packed documents
    bounds: Tensor  # (K, 2): first and last + 1 of the flattened tokens of each chunk, if packed
    firsts: Tensor  # (docs + 1,): the first chunk of each document, if packed


def cut(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Cuts:
    """Chunks of documents. Nothing is read from the device, so K is a bound: some chunks may be empty."""
    batch, length = x.shape[:2]
    size = min(MAX_CHUNK, power_of_2(min(chunk_size, length)))
    if cu_seqlens is None:
        per_row = -(-length // size)
        return Cuts(size, batch * per_row, per_row, False, batch, x, x)
    cu_seqlens = cu_seqlens.to(x.device, torch.int64)
    documents = cu_seqlens.numel() - 1
    count = (batch * length + documents * (size - 1)) // size
    firsts = F.pad((cu_seqlens.diff() + size - 1).div(size, rounding_mode="floor").cumsum(0), (1, 0))
    number = torch.arange(count, device=x.device)
    document = torch.searchsorted(firsts[1:], number, right=True).clamp_(max=documents - 1)
    start = cu_seqlens[document] + (number - firsts[document]) * size
    end = torch.minimum(start + size, cu_seqlens[document + 1])
    return Cuts(size, count, 0, True, documents, torch.stack([torch.minimum(start, end), end], 1), firsts)


class Scan:
    """The inputs of one call and the launches on them."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        dt_bias: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        dt_limit: tuple[float, float],
        chunk_size: int,
    ) -> None:
        self.x, self.b, self.c = (_rows(y.to(x.dtype)) for y in (x, b, c))
        self.dt, self.a = dt, a.contiguous()
        self.bias = self.a if dt_bias is None else dt_bias.contiguous()
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = b.shape[2:]
        self.dtype = statistics_dtype(x, dt, a)
        self.cuts = cut(x, cu_seqlens, chunk_size)
        self.step_options = {
            "LOW": dt_limit[0],
            "HIGH": dt_limit[1],
            "SOFTPLUS": dt_softplus,
            "LIMITED": dt_limit != NO_LIMIT,
            "HAS_BIAS": dt_bias is not None,
        }
        self.options = {"PACKED": self.cuts.packed, "ACC": accumulator(self.dtype), "L": self.cuts.size}
        precision = dot_precision(x.dtype)
        if x.dtype == torch.float32 and precision == "ieee":
            # On tensor cores, as three products of tf32 parts: almost as exact as plain multiply-adds, which
            # take these kernels minutes to compile.
            precision = "tf32x3"
        self.products = {**self.options, "PRECISION": precision}
        self.shape = (self.length, self.heads)
        self.sizes = (self.head_dim, self.state_size, self.cuts.per_row)
        self.steps, self.sums = self._steps()

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Step sizes and the sums of log2 decays within chunks, (B, H, T)."""
        steps, sums = (
            self.x.new_empty(self.batch, self.heads, self.length, dtype=self.dtype) for _ in range(2)
        )
        block = min(32, power_of_2(self.heads, 1))
        least = math.log2(torch.finfo(self.dtype).smallest_normal) - VANISHED
        tensors = (self.dt, self.bias, self.a, steps, sums, self.cuts.bounds)
        numbers = (self.length, self.heads, self.cuts.per_row, *self.dt.stride())
        grid = (self.cuts.count * -(-self.heads // block),)
        options = {**self.step_options, **self.options, "LEAST": least, "BH": block}
        launch(kernels.steps_kernel, grid, *tensors, *numbers, **options)
        return steps, sums

    def states(
        self, values: Tensor, keys: Tensor, entering: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """S of each chunk (K, H, P, N) in x's dtype, each document's last (docs, H, P, N); D if reverse."""
        cuts, size = self.cuts, (self.heads, self.head_dim, self.state_size)
        states = self.x.new_empty(cuts.count, *size)
        leaving = self.x.new_empty(cuts.documents, *size, dtype=self.dtype)
        block_p, block_n = (min(64, power_of_2(k)) for k in size[1:])
        blocks = -(-self.head_dim // block_p) * cuts.documents * self.heads
        if block_n == 64 and blocks * -(-self.state_size // 64) < PROGRAMS // 2:
            block_n = 32
        tensors = (values, keys, self.steps, self.sums, states if entering is None else entering.contiguous())
        numbers = (
            *self.shape,
            self.heads // self.groups,
            *self.sizes,
            *values.stride()[:3],
            *keys.stride()[:3],
        )
        launch(
            kernels.states_kernel,
            (blocks * -(-self.state_size // block_n),),
            *tensors,
            states,
            leaving,
            cuts.bounds,
            cuts.firsts,
            *numbers,
            REVERSE=reverse,
            HAS_ENTERING=entering is not None,
            BP=block_p,
            BN=block_n,
            num_stages=3,
            **self.products,
        )
        return states, leaving

    def splits(self) -> tuple[int, int]:
        """Heads that one program takes one after another, and programs that share a group."""
        repeats = self.heads // self.groups
        splits = min(repeats, max(1, -(-PROGRAMS // (self.cuts.count * self.groups))))
        each = -(-repeats // splits)
        return each, -(-repeats // each)

    def outputs(self, d: Tensor | None, states: Tensor) -> Tensor:
        """y, (B, T, H, P)."""
        y = self.x.new_empty(self.x.shape)
        each, splits = self.splits()
        block_p = min(128 if self.x.itemsize < 4 else 64, power_of_2(self.head_dim))
        strides = (stride for t in (self.x, self.b, self.c) for stride in t.stride()[:3])
        launch(
            kernels.outputs_kernel,
            (self.cuts.count * self.groups * -(-self.head_dim // block_p) * splits,),
            *(
                self.x,
                self.b,
                self.c,
                self.a if d is None else d.contiguous(),
                self.steps,
                self.sums,
                states,
                y,
            ),
            *(self.cuts.bounds, *self.shape, self.groups, *self.sizes, each, splits, *strides),
            HAS_D=d is not None,
            BP=block_p,
            BN=power_of_2(self.state_size),
            num_warps=4 if self.x.itemsize < 4 else 8,
            **self.products,
        )
        return y

    def gradients(
        self, dy: Tensor, d: Tensor | None, states: Tensor, dstates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, ddt, db, dc, and by chunk the gradients of a, d and dt_bias, (3, K, H)."""
        each, splits = self.splits()
        dx, ddt = self.x.new_empty(self.x.shape), self.dt.new_empty(self.dt.shape)
        db, dc = (self.x.new_empty(splits, *self.b.shape, dtype=self.dtype) for _ in range(2))
        # Zeros, as empty chunks write none.
        per_head = self.x.new_zeros(3, self.cuts.count, self.heads, dtype=self.dtype)
        block_p = min(128 if self.x.itemsize < 4 else 32, power_of_2(self.head_dim))
        strides = (stride for t in (self.x, self.b, self.c) for stride in t.stride()[:3])
        tensors = (
            dy,
            self.x,
            self.dt,
            self.bias,
            self.a,
            self.b,
            self.c,
            self.a if d is None else d.contiguous(),
        )
        launch(
            kernels.gradients_kernel,
            (self.cuts.count * self.groups * splits,),
            *(*tensors, self.sums, states, dstates, dx, ddt, db, dc, per_head, self.cuts.bounds, self.batch),
            *(*self.shape, self.groups, *self.sizes, each, splits, *self.dt.stride(), *strides),
            HAS_D=d is not None,
            BP=block_p,
            BN=power_of_2(self.state_size),
            P_BLOCKS=-(-self.head_dim // block_p),
            num_warps=8,
            num_stages=1,
            **self.step_options,
            **self.products,
        )
        return dx, ddt, db.sum(0), dc.sum(0), per_head


def _rows(x: Tensor) -> Tensor:
    """x itself where its last dimension lies together, else a copy where it does."""
    return x if x.stride(-1) == 1 else x.contiguous()


@define("ssd_triton")
def ssd_op(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P), final states (B or docs, H, P, N)."""
    scan = Scan(x, dt, a, b, c, dt_bias, cu_seqlens, dt_softplus, (low, high), chunk_size)
    states, final_state = scan.states(scan.x, scan.b, initial_state, reverse=False)
    return scan.outputs(d, states), final_state


@ssd_op.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (documents, *x.shape[2:], b.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=statistics_dtype(x, dt, a))


@define("ssd_triton_backward")
def ssd_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d, dt_bias (zeros where there are none) and the initial state."""
    dy = dy.contiguous()
    scan = Scan(x, dt, a, b, c, dt_bias, cu_seqlens, dt_softplus, (low, high), chunk_size)
    states, _ = scan.states(scan.x, scan.b, initial_state, reverse=False)
    dstates, dinitial = scan.states(dy, scan.c, dfinal, reverse=True)
    dx, ddt, db, dc, per_head = scan.gradients(dy, d, states, dstates)
    da, dd, dbias = (g.sum(0).to((a if y is None else y).dtype) for g, y in zip(per_head, (a, d, dt_bias)))
    return dx, ddt, da, db.to(b.dtype), dc.to(c.dtype), dd, dbias, dinitial


@ssd_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dinitial = x.new_empty((documents, *x.shape[2:], b.shape[3]), dtype=statistics_dtype(x, dt, a))
    dd, dbias = (a.new_empty(a.shape, dtype=(a if y is None else y).dtype) for y in (d, dt_bias))
    dx, ddt, da, db, dc = (y.new_empty(y.shape) for y in (x, dt, a, b, c))
    return dx, ddt, da, db, dc, dd, dbias, dinitial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.low, ctx.high, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    x, _, _, _, _, d, dt_bias, initial_state, _ = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    options = (ctx.dt_softplus, ctx.low, ctx.high, ctx.chunk_size)
    *grads, dd, dbias, dinitial = ssd_backward_op(dy, dfinal, *ctx.saved_tensors, *options)
    dstate = None if initial_state is None else dinitial.to(initial_state.dtype)
    return *grads, None if d is None else dd, None if dt_bias is None else dbias, dstate, *[None] * 5


ssd_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("ssd_triton")
def _flops(x: Any, dt: Any, a: Any, b: Any, *rest: Any, **kwargs: Any) -> int:
    scores, weights, states = products(x, b, min(MAX_CHUNK, rest[-1]))
    return scores + weights + 2 * states


@flop_formula("ssd_triton_backward")
def _flops_backward(dy: Any, dfinal: Any, x: Any, dt: Any, a: Any, b: Any, *rest: Any, **kwargs: Any) -> int:
    scores, weights, states = products(x, b, min(MAX_CHUNK, rest[-1]))
    # As in torch.py, the states once more in place of y.
    return 3 * scores + 2 * weights + 5 * states


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    angles: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    b, c = rotate(b, angles), rotate(c, angles)
    y, final_state = ssd_op(
        x, dt, a, b, c, d, dt_bias, initial_state, cu_seqlens, dt_softplus, *dt_limit, chunk_size
    )
    return (y if z is None else swiglu(z.to(y.dtype), y)), final_state if with_final_state else None
