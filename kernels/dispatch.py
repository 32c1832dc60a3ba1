"""Which form of an operator runs: named by the caller, named by the environment, or the first that can.

A form says what it supports with a reason when it does not. A form that was named (argument `form=` or the
variable TRIPTYCH_KERNELS="ssd=reference,attention=sdpa") and cannot run raises; the automatic choice falls
back to the next form in order of priority and says so once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

ENVIRONMENT_VARIABLE = "TRIPTYCH_KERNELS"
log = logging.getLogger(__name__)


def _always(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Form:
    """One implementation of an operator."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None] = _always
    """Called with the arguments of the call: None, or the reason why this form cannot serve it."""
    installed: Callable[[torch.device], str | None] = _always
    """None, or the reason why this form cannot run on such a device at all (package or hardware missing)."""


class Row(NamedTuple):
    """A line of `table()`: reason is empty where the form can run."""

    op: str
    form: str
    installed: bool
    reason: str
    default: bool


_FORMS: dict[str, dict[str, Form]] = {}


def register(op: str, form: Form, *, first: bool = False) -> None:
    """Add a form to an operator. Forms are tried in order of registration, this one before all if `first`."""
    forms = _FORMS.setdefault(op, {})
    if form.name in forms:
        raise ValueError(f"kernels: {op} already has a form named {form.name!r}")
    _FORMS[op] = {form.name: form, **forms} if first else {**forms, form.name: form}


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
def _announce(op: str, refused: str, reason: str, taken: str) -> None:
    log.warning("kernels: %s runs as %r, since %r cannot: %s", op, taken, refused, reason)


def choose(op: str, form: str | None, device: torch.device, *args: Any, **kwargs: Any) -> Form:
    """The form that serves this call.

    Raises ValueError for an unknown form or one that does not support the call, RuntimeError for a named form
    that this machine lacks.
    """
    forms = _FORMS[op]
    named = form or _parse(os.environ.get(ENVIRONMENT_VARIABLE, "")).get(op)
    if named is not None:
        if named not in forms:
            raise ValueError(f"{op}: form={named!r} does not exist; use one of {list(forms)}")
        if reason := forms[named].installed(device):
            raise RuntimeError(f"{op}: form={named!r} cannot run on {device.type}: {reason}")
        if reason := forms[named].supports(*args, **kwargs):
            raise ValueError(f"{op}: form={named!r} cannot serve this call: {reason}")
        return forms[named]
    reasons: dict[str, str] = {}
    for candidate in forms.values():
        if candidate.installed(device):
            continue
        if reason := candidate.supports(*args, **kwargs):
            reasons[candidate.name] = reason
            continue
        for refused, why in reasons.items():
            _announce(op, refused, why, candidate.name)
        return candidate
    raise ValueError(f"{op}: no form can serve this call on {device.type}: {reasons}")


def table(device: torch.device | str | None = None) -> list[Row]:
    """Every form of every operator and whether it can run on `device` (default: the GPU, else the CPU)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    named = _parse(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    rows = []
    for op, forms in sorted(_FORMS.items()):
        reasons = {name: form.installed(device) or "" for name, form in forms.items()}
        default = named.get(op) or next((name for name, reason in reasons.items() if not reason), None)
        rows += [Row(op, name, not reason, reason, name == default) for name, reason in reasons.items()]
    return rows
