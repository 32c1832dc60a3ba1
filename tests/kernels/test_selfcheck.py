"""The self-check: forms that are wrong, not finite or broken are found out, and the dispatcher does without
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from triptych.kernels import dispatch, selfcheck

CPU = torch.device("cpu")


def _reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y, (x + y).sum(-1)


class _Nan(torch.autograd.Function):
    """Right forward, NaN backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * float("nan")


def _broken(x: Tensor, y: Tensor) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device\nmore lines")


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "offset": (lambda x, y: (x * y.roll(1, 0), (x + y).sum(-1)), "output 0 is off by"),
    "second": (lambda x, y: (x * y, (x + y).sum(-1) + 0.1), "output 1 is off by"),
    "gradient": (lambda x, y: (x * y.detach(), (x + y).sum(-1)), "gradient of y is off by"),
    "nan": (lambda x, y: (_Nan.apply(x) * y, (x + y).sum(-1)), "off by inf"),
    "broken": (_broken, "RuntimeError: no kernel image is available for execution on the device"),
}


@pytest.fixture
def op() -> Iterator[str]:
    """An operator of the reference, a right form, and each wrong one, of which none is trusted."""
    name = "test_checked"

    def public(x: Tensor, y: Tensor, *, form: str | None = None) -> Any:
        return dispatch.choose(name, form, x.device, x, y).run(x, y)

    for form, (run, _) in WRONG.items():
        dispatch.register(name, dispatch.Form(form, run, trusted=False))
    dispatch.register(name, dispatch.Form("right", _reference, trusted=False))
    dispatch.register(name, dispatch.Form("reference", _reference))
    generator = torch.Generator().manual_seed(0)
    make = {
        "plain": lambda device, dtype: {k: torch.randn(7, 5, generator=generator).to(dtype) for k in "xy"}
    }
    dispatch.register_examples(name, public, make)
    yield name
    del dispatch._FORMS[name], dispatch._EXAMPLES[name]
    dispatch._automatic.cache_clear()
    dispatch._trusted.cache_clear()


@pytest.mark.parametrize("form", WRONG)
def test_wrong_forms_are_found_out(op: str, form: str) -> None:
    (problem,) = dispatch.check(op, form, CPU, torch.float32).values()
    assert problem is not None and WRONG[form][1] in problem


def test_right_ones_pass(op: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert dispatch.check(op, "right", CPU, dtype) == {"plain": None}


def test_an_automatic_choice_does_without_what_fails(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert [dispatch.choose(op, None, CPU).name for _ in range(2)] == ["right"] * 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(WRONG), "each is named once"
    assert messages[0].startswith(
        "kernels: test_checked does without 'offset' on cpu: it failed the self-check"
    )
    assert dispatch.choose(op, "offset", CPU).name == "offset", "whoever names a form answers for it"


def test_a_form_that_no_example_fits_is_not_trusted(op: str) -> None:
    refuses = dispatch.Form("refuses", _reference, supports=lambda *x, **k: "never", trusted=False)
    dispatch.register(op, refuses)
    assert dispatch.check(op, "refuses", CPU, torch.float32) == {}
    assert not dispatch._trusted(op, "refuses", CPU, torch.float32)


def test_the_check_leaves_modes_and_generators_alone(op: str) -> None:
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        function, makers = dispatch.examples(op)
        arguments = makers["plain"](CPU, torch.float32)
        right, oracle = (partial(function, form=form) for form in ("right", "reference"))
        error, where = selfcheck.error_of(right, oracle, arguments)
    assert error < 1e-6 and where
    assert torch.equal(state, torch.get_rng_state())


CHECKED = [op for op in dispatch.operators() if dispatch.examples(op)[1]]


def passes(op: str, dtype: torch.dtype, interpreted: bool) -> None:
    """What `triptych doctor --kernels` shows: of Triton's forms, interpreted here, or of the others."""
    for row in dispatch.table("cpu"):
        if (
            row.op == op
            and row.installed
            and row.form != "reference"
            and (row.form == "triton") is interpreted
        ):
            found = dispatch.check(op, row.form, CPU, dtype)
            assert set(found.values()) <= {None}, f"{row.form}: {found}"
            assert found or not row.default, f"no example fits {row.form}"


@pytest.mark.parametrize("op", CHECKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_of_pytorch_passes(op: str, dtype: torch.dtype) -> None:
    passes(op, dtype, interpreted=False)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in CHECKED if "triton" in dispatch.forms(op)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_of_triton_passes(op: str, dtype: torch.dtype) -> None:
    passes(op, dtype, interpreted=True)
