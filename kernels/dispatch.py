"""Which form of an operator runs: named by the caller, named by the environment, or the first that can.

A form says what it supports with a reason when it does not. A form that was named (argument `form=` or the
variable TRIPTYCH_KERNELS="ssd=reference,attention=sdpa") and cannot run raises; the automatic choice falls
back to the next form in order of priority and says so once.

A form that is not `trusted` (compiled on the spot, or somebody else's) is held against the reference on small
calls, once per process, device and dtype, before an automatic choice takes it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triptych.kernels import selfcheck

ENVIRONMENT_VARIABLE = "TRIPTYCH_KERNELS"
log = logging.getLogger(__name__)


def always(*args: Any, **kwargs: Any) -> str | None:
    """No reason against anything."""
    return None


def _never(device: torch.device) -> bool:
    return False


@dataclass(frozen=True)
class Form:
    """One implementation of an operator."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None] = always
    """Called with the arguments of the call: None, or the reason why this form cannot serve it."""
    installed: Callable[[torch.device], str | None] = always
    """None, or the reason why this form cannot run on such a device at all (package or hardware missing)."""
    trusted: bool = True
    """False: an automatic choice takes the form only after the self-check on the device."""
    by_name_only: Callable[[torch.device], bool] = _never
    """True: an automatic choice never takes the form on such a device."""


Examples = Mapping[str, Callable[[torch.device, torch.dtype], dict[str, Any]]]


class Row(NamedTuple):
    """A line of `table()`: reason is empty where the form can run."""

    op: str
    form: str
    installed: bool
    reason: str
    default: bool
    trusted: bool
    """False: used only after its self-check."""


_FORMS: dict[str, dict[str, Form]] = {}
_EXAMPLES: dict[str, tuple[Callable[..., Any], Examples]] = {}


def register(op: str, form: Form, *, first: bool = False) -> None:
    """Add a form to an operator. Forms are tried in order of registration, this one before all if `first`."""
    forms = _FORMS.setdefault(op, {})
    if form.name in forms:
        raise ValueError(f"kernels: {op} already has a form named {form.name!r}")
    _FORMS[op] = {form.name: form, **forms} if first else {**forms, form.name: form}
    _automatic.cache_clear()


def register_examples(op: str, function: Callable[..., Any], makers: Examples) -> None:
    """Small calls of the operator's public function, for self-checks.

    makers: by name, functions of device and dtype that give the keyword arguments without `form`, floating
    inputs in that dtype. The first is one that every form can serve.
    """
    _EXAMPLES[op] = (function, makers)


def operators() -> list[str]:
    """The names of all operators."""
    return sorted(_FORMS)


def forms(op: str) -> list[str]:
    """The names of an operator's forms, in order of priority."""
    return list(_FORMS[op])


def examples(op: str) -> tuple[Callable[..., Any], Examples]:
    """The public function of an operator and what was registered with it; no makers where nothing was."""
    return _EXAMPLES.get(op, (always, {}))


@functools.lru_cache(maxsize=8)
def _parse(value: str) -> dict[str, str]:
    chosen = {}
    for item in filter(None, (part.strip() for part in value.split(","))):
        op, _, form = item.partition("=")
        if op not in _FORMS:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: {item!r} names no operator; use one of {sorted(_FORMS)}"
            )
        if form not in _FORMS[op]:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: {item!r} names no form of {op}; use one of {list(_FORMS[op])}"
            )
        chosen[op] = form
    return chosen


@functools.cache
def _announce(op: str, taken: str, device: str, reasons: str) -> None:
    if reasons:
        log.warning("kernels: %s runs as %r, since %s", op, taken, reasons)
    else:
        log.info("kernels: %s runs as %r on %s", op, taken, device)


def check(op: str, form: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Hold a form against the reference on each registered example that it serves: None, or what is wrong."""
    function, makers = examples(op)
    found: dict[str, str | None] = {}
    for name, make in makers.items():
        ours, oracle = (functools.partial(function, form=one) for one in (form, "reference"))
        with contextlib.suppress(selfcheck.CannotServe):
            found[name] = selfcheck.check(ours, oracle, make(device, dtype), dtype)
    return found


@functools.cache
def _trusted(op: str, form: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an untrusted form served an example of the self-check, and was right on all that it serves."""
    found = check(op, form, device, dtype)
    for name, problem in found.items():
        if problem is not None:
            where = f"{op} does without {form!r} on {device}"
            log.warning("kernels: %s: it failed the self-check (%s: %s)", where, name, problem)
            return False
    return bool(found)


@functools.cache
def _automatic(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The forms that an automatic choice may take, in order of priority."""
    return tuple(
        form.name
        for form in _FORMS[op].values()
        if not form.by_name_only(device)
        and not form.installed(device)
        and (form.trusted or _trusted(op, form.name, device, dtype))
    )


# Constants to torch.compile, which then need not trace what looks for packages, runs checks and writes logs.
@torch.compiler.assume_constant_result
def _candidates(op: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    return _automatic(op, torch.device(device), dtype)


@torch.compiler.assume_constant_result
def _taken(op: str, form: str, device: str, reasons: str) -> None:
    _announce(op, form, device, reasons)


@torch.compiler.assume_constant_result
def _named(op: str, form: str | None, device: str) -> str | None:
    """The form that the caller or the environment names; raises where this machine lacks it."""
    named = form or _parse(os.environ.get(ENVIRONMENT_VARIABLE, "")).get(op)
    if named is None:
        return None
    if named not in _FORMS[op]:
        raise ValueError(f"{op}: form={named!r} does not exist; use one of {list(_FORMS[op])}")
    place = torch.device(device)
    if reason := _FORMS[op][named].installed(place):
        raise RuntimeError(f"{op}: form={named!r} cannot run on {place.type}: {reason}")
    return named


def _dtype_of(args: tuple[Any, ...]) -> torch.dtype:
    """Of the first floating tensor, for which the self-check is made."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.dtype
    return torch.float32


def choose(op: str, form: str | None, device: torch.device, *args: Any, **kwargs: Any) -> Form:
    """The form that serves this call.

    Raises ValueError for an unknown form or one that does not support the call, RuntimeError for a named form
    that this machine lacks.
    """
    named = _named(op, form, str(device))
    if named is not None:
        if reason := _FORMS[op][named].supports(*args, **kwargs):
            raise selfcheck.CannotServe(f"{op}: form={named!r} cannot serve this call: {reason}")
        return _FORMS[op][named]
    reasons = []
    for name in _candidates(op, str(device), _dtype_of(args)):
        if reason := _FORMS[op][name].supports(*args, **kwargs):
            reasons.append(f"{name!r} cannot: {reason}")
            continue
        _taken(op, name, str(device), "; ".join(reasons))
        return _FORMS[op][name]
    raise ValueError(f"{op}: no form can serve this call on {device.type}: {'; '.join(reasons)}")


def table(device: torch.device | str | None = None) -> list[Row]:
    """Every form of every operator and whether it can run on `device` (default: the GPU, else the CPU)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    named = _parse(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    rows = []
    for op, forms in sorted(_FORMS.items()):
        reasons = {name: form.installed(device) or "" for name, form in forms.items()}
        free = (name for name, form in forms.items() if not reasons[name] and not form.by_name_only(device))
        default = named.get(op) or next(free, None)
        rows += [
            Row(op, name, not reason, reason, name == default, forms[name].trusted)
            for name, reason in reasons.items()
        ]
    return rows
