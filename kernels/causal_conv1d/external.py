"""The package causal-conv1d (Dao-AILab, version 1.6.1 was read), which is written in CUDA.

It takes (B, C, T), with channels next to each other in memory ("channel last"): our (B, T, C), transposed.
Packed documents are marked by a number per token, and then it knows no states.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from triptych.kernels.segments import segment_ids

ALIGNMENT = 8
"""Channels, and strides of tokens and rows in elements, have to be multiples of it."""
CHUNK = 64
"""Tokens of one of its blocks. The last block of a row reads the document numbers of a whole one, beyond the
end of what it was given (its pull request 101)."""
LARGEST = 1 << 32
"""It counts elements in 32 bits without sign."""


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> str | None:
    """Why the package cannot serve a call; None where it can."""
    if not 2 <= weight.shape[1] <= 4:
        return f"the package has 2 to 4 taps, not {weight.shape[1]}"
    if x.shape[2] % ALIGNMENT:
        return f"the package needs channels in multiples of {ALIGNMENT}, not {x.shape[2]}"
    if cu_seqlens is not None and (initial_state is not None or with_final_state):
        return "the package has no states of packed documents"
    wide = [t.dtype for t in (x, weight) if t.dtype not in (torch.float32, torch.float16, torch.bfloat16)]
    if wide:
        return f"the package has fp32, fp16 and bf16, not {wide[0]}"
    if max(x.shape[0] * x.stride(0), x.numel()) >= LARGEST:
        return f"the package counts elements in 32 bits, and x {tuple(x.shape)} has too many"
    return None


def sums_in_any_order(device: torch.device) -> bool:
    """True where its gradients of the weights are sums by atomic additions, which no two runs make alike."""
    asked = os.environ.get("CAUSAL_CONV1D_DETERMINISTIC", "")[:1]
    return asked == "0" or (asked != "1" and not torch.are_deterministic_algorithms_enabled())


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it with the strides that the package asks for."""
    if x.stride(2) == 1 and x.stride(0) % ALIGNMENT == 0 and x.stride(1) % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def document_numbers(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """int32 (B, T), in memory that goes on for a block behind its end."""
    numbers = torch.zeros(batch * length + CHUNK, dtype=torch.int32, device=cu_seqlens.device)
    numbers = numbers[: batch * length].view(batch, length)
    return numbers.copy_(segment_ids(cu_seqlens, batch, length))


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
    from causal_conv1d import causal_conv1d_fn

    if bias is not None:
        common = torch.promote_types(weight.dtype, bias.dtype)
        weight, bias = weight.to(common), bias.to(common)
    state = None
    if initial_state is not None:
        # Its columns one behind the other, channels next to each other.
        state = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    result = causal_conv1d_fn(
        aligned(x).transpose(1, 2),
        weight,
        bias,
        seq_idx=None if cu_seqlens is None else document_numbers(cu_seqlens, x.shape[0], x.shape[1]),
        initial_states=state,
        return_final_states=with_final_state,
        activation=activation,
    )
    y, final_state = result if with_final_state else (result, None)
    return y.transpose(1, 2), final_state
