"""What holds of every operator: clear errors for tensors that do not fit, shapes without memory, examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from triptych.kernels import dispatch

CPU = torch.device("cpu")
OPERATORS = dispatch.operators()
CALLS = [(op, name) for op in OPERATORS for name in dispatch.examples(op)[1]]


def call(op: str, example: str) -> tuple[Any, dict[str, Any]]:
    function, makers = dispatch.examples(op)
    return function, makers[example](CPU, torch.float32)


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_has_a_reference_and_an_example(op: str) -> None:
    assert dispatch.forms(op)[-1] == "reference", "the last resort, and the oracle"
    assert dispatch.examples(op)[1], "without one no compiled form is ever trusted"


@pytest.mark.parametrize(("op", "example"), CALLS)
def test_a_tensor_elsewhere_is_named(op: str, example: str) -> None:
    function, arguments = call(op, example)
    names = list(tensors(arguments))
    for name in names[1:]:
        elsewhere = arguments | {name: arguments[name].to("meta")}
        with pytest.raises(ValueError, match=rf"^{op}: .*{name} is on meta and \w+ on cpu; move"):
            function(**elsewhere)


@pytest.mark.parametrize(("op", "example"), CALLS)
def test_integers_and_numbers_are_told_apart(op: str, example: str) -> None:
    function, arguments = call(op, example)
    for name, value in tensors(arguments).items():
        if name in ("mask", "positions") or (op, name) == ("scan_gather", "x"):
            continue  # either will do
        whole = not value.is_floating_point()
        wrong = value.float() if whole else value.to(torch.int64)
        meant = "of integers" if whole else "floating"
        with pytest.raises(ValueError, match=rf"^{op}: {name} must be {meant}, it is torch\.\w+; use"):
            function(**arguments | {name: wrong})


@pytest.mark.parametrize(("op", "example"), CALLS)
def test_documents_end_with_the_tokens(op: str, example: str) -> None:
    function, arguments = call(op, example)
    bounds = arguments.get("cu_seqlens")
    if bounds is None:
        return
    with pytest.raises(ValueError, match=r"cu_seqlens must start at 0 and end at B\*T = .* ends at"):
        function(**arguments | {"cu_seqlens": bounds - (bounds == bounds[-1]).to(bounds.dtype)})


@pytest.mark.parametrize("op", OPERATORS)
def test_shapes_without_memory_are_those_of_results(op: str) -> None:
    """Meta tensors, on which models are counted, and fake ones, through which torch.compile traces."""
    for example in dispatch.examples(op)[1]:
        function, arguments = call(op, example)
        if any(not value.is_floating_point() for value in tensors(arguments).values()):
            continue  # what documents and experts ask for depends on values
        nowhere = tree_map_only(Tensor, lambda x: x.to("meta"), arguments)
        pairs = zip(_flat(function(**nowhere)), _flat(function(**arguments)), strict=True)
        for found, expected in pairs:
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype), example
            assert found.is_meta


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, tuple):
        return [tensor for part in result for tensor in _flat(part)]
    return [] if result is None else [result]
