"""Packed documents: checks of `cu_seqlens` and what operators derive from it.

Legend: B batch, T length of a row, docs documents in all rows.
`cu_seqlens` is int32 or int64 (docs + 1,): the starts of the documents in the flattened B*T tokens, and the
end. A document never crosses a row. Boundaries are checked where they can be read at no cost, on the CPU.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless cu_seqlens cuts B rows of T tokens into non-empty documents within rows."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be 1-D with num_docs + 1 entries, its shape is {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, it is {cu_seqlens.dtype}; use cu_seqlens.int()")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading the values would stall the device's queue; meta and traced tensors have none.
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != batch * length:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at B*T = {batch}*{length} = {batch * length}; "
            f"it starts at {bounds[0]} and ends at {bounds[-1]}"
        )
    if any(start >= end for start, end in itertools.pairwise(bounds)):
        raise ValueError("cu_seqlens must increase strictly: a document without tokens has to be left out")
    missing = set(range(length, batch * length, length)).difference(bounds)
    if missing:
        raise ValueError(
            f"cu_seqlens must contain every multiple of T={length}, since a document never crosses a row; "
            f"{min(missing)} is missing"
        )


def segment_ids(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, T) int32: the number of the document that holds each token."""
    starts = torch.zeros(batch * length, dtype=torch.int32, device=cu_seqlens.device)
    starts[cu_seqlens[1:-1].long()] = 1
    return starts.cumsum(0, dtype=torch.int32).view(batch, length)


def document_bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """[(start, end)] of each document in the flattened tokens. Reads the values, a sync on an accelerator."""
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))
