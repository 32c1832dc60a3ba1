"""The dispatcher: names, the environment, fallback with a reason, the table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from triptych.kernels import dispatch, swiglu, table

CPU = torch.device("cpu")


@pytest.fixture
def op() -> Iterator[str]:
    """An operator of three forms: one not installed, one that serves even numbers, one that serves all."""
    name = "test_op"
    dispatch.register(name, dispatch.Form("plain", lambda n: f"plain {n}"))
    refuse_odd = dispatch.Form(
        "even", lambda n: f"even {n}", supports=lambda n: "n is odd" if n % 2 else None
    )
    dispatch.register(name, refuse_odd, first=True)
    absent = dispatch.Form(
        "absent", lambda n: "", installed=lambda device: "package `absent` is not installed"
    )
    dispatch.register(name, absent, first=True)
    yield name
    del dispatch._FORMS[name]
    dispatch._announce.cache_clear()
    dispatch._automatic.cache_clear()


def test_first_form_that_can(op: str, caplog: pytest.LogCaptureFixture) -> None:
    assert dispatch.choose(op, None, CPU, 2).name == "even"
    with caplog.at_level("WARNING"):
        assert [dispatch.choose(op, None, CPU, 3).name for _ in range(3)] == ["plain"] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "kernels: test_op runs as 'plain', since 'even' cannot: n is odd"
    ]


def test_the_choice_is_logged_once(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        for _ in range(3):
            dispatch.choose(op, None, CPU, 2)
    assert [r.getMessage() for r in caplog.records] == ["kernels: test_op runs as 'even' on cpu"]


def test_named_forms_run_or_raise(op: str) -> None:
    assert dispatch.choose(op, "plain", CPU, 2).name == "plain"
    with pytest.raises(ValueError, match="form='even' cannot serve this call: n is odd"):
        dispatch.choose(op, "even", CPU, 3)
    with pytest.raises(
        RuntimeError, match="form='absent' cannot run on cpu: package `absent` is not installed"
    ):
        dispatch.choose(op, "absent", CPU, 2)
    with pytest.raises(
        ValueError, match=r"form='x' does not exist; use one of \['absent', 'even', 'plain'\]"
    ):
        dispatch.choose(op, "x", CPU, 2)


def test_environment(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, " test_op=plain, swiglu=reference")
    assert dispatch.choose(op, None, CPU, 2).name == "plain"
    assert dispatch.choose(op, "even", CPU, 2).name == "even", "the argument is stronger"
    defaults = {row.op: row.form for row in table("cpu") if row.default}
    assert (defaults["test_op"], defaults["swiglu"]) == ("plain", "reference")
    for value, message in (("no_op=x", "names no operator"), ("swiglu=fast", "names no form of swiglu")):
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
        with pytest.raises(ValueError, match=message):
            swiglu(torch.ones(2), torch.ones(2))


def test_table(op: str) -> None:
    rows = [row for row in table("cpu") if row.op == op]
    assert rows == [
        (op, "absent", False, "package `absent` is not installed", False, True),
        (op, "even", True, "", True, True),
        (op, "plain", True, "", False, True),
    ]
    operators = {"attention", "causal_conv1d", "linear_cross_entropy", "rms_norm", "rotary", "ssd", "swiglu"}
    assert operators <= {row.op for row in table()}


def test_a_form_registers_once(op: str) -> None:
    with pytest.raises(ValueError, match="already has a form named 'plain'"):
        dispatch.register(op, dispatch.Form("plain", lambda n: n))
