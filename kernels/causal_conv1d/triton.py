"""Causal depthwise convolution in Triton: one pass over memory each way, its activation and states included.

Saves its inputs and nothing else. Legend and mathematics: triton_kernels.py. Up to MAX_TAPS taps, channels
next to each other in memory; tokens and rows of x may have any stride.
"""

from typing import Any

import torch
from torch import Tensor

from triptych.kernels.causal_conv1d.triton_kernels import (
    SEARCH,
    backward_kernel,
    dstate_kernel,
    final_state_kernel,
    forward_kernel,
)
from triptych.kernels.library import define, flop_formula, statistics_dtype
from triptych.kernels.triton_launch import accumulator, launch, power_of_2

BLOCK_C = 128
"""Channels of a program, which is a single warp: 8 bytes a thread in bf16, 16 in fp32."""
LONGEST_STRIP, SHORTEST_STRIP = 128, 16
"""Tokens of a program. A strip reads up to 7 tokens of its neighbours, so longer ones read less twice."""
ENOUGH_PROGRAMS = 4096
"""About as many warps as an H200 keeps at work on kernels with so many registers, twice over."""


def _strip(batch: int, length: int, channels: int) -> int:
    """Tokens of a strip: the longest that still gives enough programs."""
    strip = LONGEST_STRIP
    while strip > SHORTEST_STRIP and batch * -(-length // strip) * -(-channels // BLOCK_C) < ENOUGH_PROGRAMS:
        strip //= 2
    return strip


def _channels_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _constants(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, cu_seqlens: Tensor | None
) -> dict[str, Any]:
    return {
        "TAPS": weight.shape[1],
        "SILU": silu,
        "PACKED": cu_seqlens is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_C": BLOCK_C,
        "ACC": accumulator(statistics_dtype(x, weight)),
        "num_warps": 1,
    }


def _count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many documents there are."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _doc_blocks(docs: int) -> int:
    """How often a program looks for its first document; few values, each of which is compiled."""
    return power_of_2(-(-docs // SEARCH.value), at_least=1)


def _state_strides(state: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if state is None else state.stride()


@define("causal_conv1d_triton")
def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    with_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, T, C) and the final states (docs, C, K-1), none of them unless asked for."""
    x = _channels_together(x)
    batch, length, channels = x.shape
    strip, blocks = _strip(batch, length, channels), -(-channels // BLOCK_C)
    strips = -(-length // strip)
    constants = _constants(x, weight, bias, silu, cu_seqlens) | {"HAS_STATE": initial_state is not None}
    docs = _count(x, cu_seqlens)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s_d, s_c, s_k = _state_strides(initial_state)
    launch(
        forward_kernel, (batch * strips, blocks),
        x, weight, bias, initial_state, cu_seqlens, y,
        length, channels, docs, strips, x.stride(0), x.stride(1), *weight.stride(), s_d, s_c, s_k,
        DOC_BLOCKS=_doc_blocks(docs), STRIP=strip, **constants,
    )  # fmt: skip
    look_back = weight.shape[1] - 1
    final_state = x.new_empty(docs if with_final_state else 0, look_back, channels)
    if final_state.numel():
        for unused in ("SILU", "HAS_BIAS"):
            del constants[unused]
        launch(
            final_state_kernel, (docs, blocks),
            x, initial_state, cu_seqlens, final_state,
            length, channels, x.stride(0), x.stride(1), s_d, s_c, s_k,
            **constants,
        )  # fmt: skip
    return y, final_state.transpose(1, 2)


@causal_conv1d_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    with_final_state: bool,
) -> tuple[Tensor, Tensor]:
    docs = _count(x, cu_seqlens) if with_final_state else 0
    return x.new_empty(x.shape), x.new_empty(docs, weight.shape[1] - 1, x.shape[2]).transpose(1, 2)


@define("causal_conv1d_triton_backward")
def causal_conv1d_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial_state, the latter two empty where there is none."""
    x, dy = _channels_together(x), _channels_together(dy)
    batch, length, channels = x.shape
    taps = weight.shape[1]
    strip, blocks = _strip(batch, length, channels), -(-channels // BLOCK_C)
    strips = -(-length // strip)
    constants = _constants(x, weight, bias, silu, cu_seqlens) | {"HAS_DFINAL": dfinal is not None}
    docs = _count(x, cu_seqlens)
    dtype = statistics_dtype(x, weight)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = x.new_empty(batch * strips, taps + 1, channels, dtype=dtype)
    strides = (
        *dy.stride()[:2], *_state_strides(dfinal), *x.stride()[:2],
        *weight.stride(), *_state_strides(initial_state),
    )  # fmt: skip
    launch(
        backward_kernel, (batch * strips, blocks),
        dy, dfinal, x, weight, bias, initial_state, cu_seqlens, dx, sums,
        length, channels, docs, strips, *strides,
        DOC_BLOCKS=_doc_blocks(docs), STRIP=strip, HAS_STATE=initial_state is not None, **constants,
    )  # fmt: skip
    dstate = x.new_empty(0)
    if initial_state is not None:
        dstate = initial_state.new_empty(docs, taps - 1, channels)
        if dstate.numel():
            launch(
                dstate_kernel, (docs, blocks),
                dy, dfinal, x, weight, bias, initial_state, cu_seqlens, dstate,
                length, channels, *strides,
                **constants,
            )  # fmt: skip
        dstate = dstate.transpose(1, 2)
    dparameters = sums.sum(0)
    dweight = dparameters[:taps].t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    dbias = x.new_empty(0) if bias is None else dparameters[taps].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dstate


@causal_conv1d_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dstate = x.new_empty(0)
    if initial_state is not None:
        docs, channels, look_back = initial_state.shape
        dstate = initial_state.new_empty(docs, look_back, channels).transpose(1, 2)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    if dfinal is not None and dfinal.numel() == 0:
        dfinal = None
    dx, dweight, dbias, dstate = causal_conv1d_backward_op(
        dy, dfinal, x, weight, bias, initial_state, cu_seqlens, ctx.silu
    )
    dinitial = None if initial_state is None else dstate
    return dx, dweight, None if bias is None else dbias, dinitial, None, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup)


@flop_formula("causal_conv1d_triton")
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * batch * length * channels * weight[1]


@flop_formula("causal_conv1d_triton_backward")
def _flops_backward(dy: Any, dfinal: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(x, weight)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function."""
    y, final_state = causal_conv1d_op(
        x, weight, bias, initial_state, cu_seqlens, activation == "silu", with_final_state
    )
    return y, final_state if with_final_state else None
