"""How this room registers its operators with PyTorch: custom op, FLOP formula, no autocast inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "triptych"
F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """Run `function` with autocast off: an operator chooses the dtype of each of its matmuls itself.

    Custom ops fall through the Autocast dispatch key, so without this their inner matmuls would be recast.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first: Tensor = args[0] if args else next(iter(kwargs.values()))
        device_type = first.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def define(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function as the custom op `triptych::<name>`, its first argument a tensor."""

    def decorate(function: Callable[..., Any]) -> Any:
        return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())(without_autocast(function))

    return decorate


def flop_formula(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: the function of the op's argument *shapes* that counts its FLOPs (2 per multiply-add)."""
    return register_flop_formula(getattr(torch.ops.triptych, name))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give a matmul on x's device; None where autocast is off or x is fp64."""
    device_type = x.device.type
    if x.dtype == torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def statistics_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32: the dtype of sums, statistics, decays and angles."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def operator(*, integers: tuple[str, ...] = ("cu_seqlens",), free: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Decorator of a public function: its tensors have to be on one device, and floating.

    integers: arguments that have to be whole numbers instead. free: of which the dtype is not looked at.
    Without it PyTorch takes a call with one tensor on the meta device for a question about shapes, and a
    kernel on a GPU would read an address of the CPU. Raises ValueError.
    """

    def decorate(function: F) -> F:
        names = tuple(inspect.signature(function).parameters)
        op = function.__name__

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            device, first = None, ""
            for name, value in (*zip(names, args), *kwargs.items()):
                for tensor in value if isinstance(value, tuple) else (value,):
                    if not isinstance(tensor, Tensor):
                        continue
                    _check_dtype(op, name, tensor, name in integers, name in free)
                    if device is None:
                        device, first = tensor.device, name
                    elif tensor.device != device:
                        raise ValueError(
                            f"{op}: {name} is on {tensor.device} and {first} on {device}; "
                            f"move it with {name}.to({first}.device)"
                        )
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def _check_dtype(op: str, name: str, tensor: Tensor, whole: bool, free: bool) -> None:
    floating = tensor.is_floating_point()
    if whole and (floating or tensor.dtype == torch.bool):
        raise ValueError(f"{op}: {name} must be of integers, it is {tensor.dtype}; use {name}.long()")
    if not (whole or free or floating):
        raise ValueError(f"{op}: {name} must be floating, it is {tensor.dtype}; use {name}.float()")
