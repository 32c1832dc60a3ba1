"""What calls ask for and what flash-attention kernels, in PyTorch or outside, have in common.

B batch, T queries, S keys, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from triptych.kernels.segments import document_bounds

Dropout = Callable[[Tensor], Tensor] | None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether this call is to be differentiated with respect to one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; of another device, where only tests come, that of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def flash_limits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: Dropout) -> str | None:
    """What no flash-attention kernel does: None, or the reason why this call asks for it."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels take float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if dropout is not None:
        return "its dropout would draw from the device's generator, not from the sample keys"
    if mask is not None:
        return "its kernels take no mask"
    if q.shape[-1] != v.shape[-1]:
        return f"its kernels need one head dim, q has {q.shape[-1]} and v {v.shape[-1]}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"its kernels need head dims that are multiples of 8 up to 256, not {q.shape[-1]}"
    return None


def layout(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, int, int]:
    """Where documents (rows, if none are packed) start among queries and keys, int32 (documents + 1,), and
    the greatest numbers of both. Starts on a GPU are not read: there T is taken for the longest document."""
    (batch, length), keys = q.shape[:2], k.shape[1]
    if cu_seqlens is None:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        return starts * length, starts * keys, length, keys
    longest = length
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        longest = max(end - start for start, end in document_bounds(cu_seqlens))
    starts = cu_seqlens.to(q.device, torch.int32)
    return starts, starts, longest, longest
