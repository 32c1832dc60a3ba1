"""Gathering and combining as written, by indexing. N tokens, K slots of a token, A rows, C channels."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.library import statistics_dtype


def moe_gather(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """Shapes as in the public function; autograd by PyTorch."""
    return x[tokens]


def moe_combine(rows: Tensor, weights: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """Shapes as in the public function; autograd by PyTorch."""
    dtype = statistics_dtype(rows, weights)
    placed = weights.to(dtype) * (slots >= 0)
    # A row of zeros at the end, which is what index -1 means.
    padded = rows.new_zeros(rows.shape[0] + 1, rows.shape[1], dtype=dtype)
    padded = padded.index_add(0, tokens.new_tensor(range(rows.shape[0])), rows.to(dtype))
    return (placed.unsqueeze(-1) * padded[slots]).sum(1).to(rows.dtype)
