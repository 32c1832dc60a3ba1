"""Is a form right on this device? It is held against the reference in float64, with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest error that passes, relative to the largest element. What breaks kernels (a wrong mask, an overflow,
an offset) is far above; how exact forms are is for the tests to say."""


class CannotServe(ValueError):
    """A form says of a call that it cannot serve it, which is no fault of the form."""


def error_of(
    function: Callable[..., Any], oracle: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[float, str]:
    """The largest relative error of outputs and gradients, and of what; infinite where one is not finite.

    arguments: of a call of both, by name; the oracle gets the same values in float64.
    """
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        device_type = next(x.device.type for x in arguments.values() if isinstance(x, Tensor))
        with torch.autocast(device_type, enabled=False):
            found = _run(function, arguments)
            exact = _run(oracle, {k: _wide(v) for k, v in arguments.items()})
    errors = {}
    for name, value in found.items():
        scale = float(exact[name].abs().max()) or 1.0
        error = float((value.double() - exact[name]).abs().max()) / scale
        errors[name] = error if error == error else float("inf")
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def check(
    function: Callable[..., Any], oracle: Callable[..., Any], arguments: dict[str, Any], dtype: torch.dtype
) -> str | None:
    """None where `function` computes what the oracle does; else what is wrong.

    arguments: floating inputs in `dtype` or wider. Raises CannotServe as the function does.
    """
    try:
        error, where = error_of(function, oracle, arguments)
    except CannotServe:
        raise
    except Exception as problem:  # whatever a foreign kernel or compiler throws, the form is not to be used
        return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
    if error <= TOLERANCE[dtype]:
        return None
    return f"{where} is off by {error:.1e} of its largest element in {str(dtype).removeprefix('torch.')}"


def _wide(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _run(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients of every floating input, under a fixed cotangent."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(f"{name}[{i}]", x) for i, x in enumerate(value))
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = value.detach().clone().requires_grad_()
            return leaves[name]
        return value

    outputs = _tensors(function(**{k: leaf(k, v) for k, v in arguments.items()}))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    pairs = [(y, dy) for y, dy in zip(outputs, cotangents) if y.requires_grad]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {k}": v.grad for k, v in leaves.items() if v.grad is not None}


def _tensors(result: Any) -> list[Tensor]:
    """The floating tensors of a nested result."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [y for part in result for y in _tensors(part)] if isinstance(result, tuple | list) else []
