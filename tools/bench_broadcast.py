"""transformers' Mamba-2 scan with the contractions that it had before its pull request 48978 (September
2026).

Until then the scan wrote each contraction as a broadcast product that is then summed up, the largest of them
of shape (batch, chunks, chunk, chunk, heads, state); since then it is an einsum, which is a matmul. Published
comparisons with transformers' fallback are with the former. Here the module's own code runs, with
`torch.einsum` exchanged for a product and a sum.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class _Torch:
    """The module torch, but for `einsum`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def einsum(equation: str, first: Tensor, second: Tensor) -> Tensor:
        return broadcast_einsum(equation, first, second)


def contract_by_broadcast(module: ModuleType) -> None:
    """Make the einsums in a transformers module products and sums, for the rest of this process."""
    module.torch = _Torch()  # type: ignore[attr-defined]


def broadcast_einsum(equation: str, first: Tensor, second: Tensor) -> Tensor:
    """torch.einsum of two tensors, with the product before the sum written to memory.

    >>> broadcast_einsum("ij,jk->ik", torch.ones(2, 3), torch.ones(3, 4)).shape
    torch.Size([2, 4])
    """
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    summed = [letter for letter in dict.fromkeys(left + right) if letter not in output]
    letters = [*output, *summed]
    product = _laid_out(first, left, letters) * _laid_out(second, right, letters)
    return product.sum(dim=tuple(range(len(output), len(letters)))) if summed else product


def _laid_out(x: Tensor, own: str, letters: list[str]) -> Tensor:
    """x with one dimension per letter, of size 1 where x has not got it."""
    present = [letter for letter in letters if letter in own]
    x = x.permute([own.index(letter) for letter in present])
    for place, letter in enumerate(letters):
        if letter not in own:
            x = x.unsqueeze(place)
    return x
