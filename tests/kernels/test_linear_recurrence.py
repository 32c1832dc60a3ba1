"""Linear recurrence: every form against the recurrence in float64, states, packing, decays, errors."""

from __future__ import annotations

import ast
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from triptych.kernels import linear_recurrence
from triptych.kernels.linear_recurrence import external, limits, scan
from triptych.kernels.linear_recurrence import triton as in_triton
from triptych.kernels.linear_recurrence.torch import linear_recurrence_backward_op, linear_recurrence_op

FP32_FLOOR = 2e-6  # some roundings of a sum of products
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
FP16_FLOOR = 1e-3  # and 2^-11 to fp16

full = partial(linear_recurrence, return_final_state=True)
plain = partial(full, form="reference")
in_both_forms = pytest.mark.parametrize("form", ["torch", "triton"])


def make_inputs(
    length: int,
    *,
    batch: int = 1,
    channels: int = 5,
    decay: float = 1.0,
    log_decay: bool = False,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> dict[str, Tensor]:
    """Decays exp(-decay u), u uniform in (0, 1), or their logs; a state for each of `states` documents."""
    logs = -decay * torch.rand(batch, length, channels, dtype=torch.float64)
    return {
        "a": (logs if log_decay else logs.exp()).to(dtype),
        "b": torch.randn(batch, length, channels, dtype=dtype),
        "initial_state": torch.randn(
            states or batch, channels, dtype=torch.promote_types(dtype, torch.float32)
        ),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three chunks for 2 rows of 5 channels."""
    monkeypatch.setitem(scan.STEP_ELEMENTS, "cpu", 35)


@pytest.mark.parametrize("form", ["torch", "reference", "triton"])
def test_equals_the_closed_form(form: str) -> None:
    inputs = make_inputs(40)
    inputs["a"][0, 20, 1], inputs["a"][0, 30:, 2] = 0.0, -inputs["a"][0, 30:, 2]
    a, b, h0 = (v.squeeze(0) for v in inputs.values())
    # h[t] = sum over i <= t of b[i] times the product of a over (i, t], and h0 times that over all of [0, t].
    expected = torch.stack(
        [
            a[: t + 1].prod(0) * h0 + sum(a[i + 1 : t + 1].prod(0) * b[i] for i in range(t + 1))
            for t in range(40)
        ]
    )
    torch.testing.assert_close(
        linear_recurrence(**inputs, form=form).squeeze(0), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_chunks_equal_the_recurrence(
    length: int, chunk_size: int, agree: Callable[..., None], several_chunks: None
) -> None:
    agree(partial(full, chunk_size=chunk_size), plain, make_inputs(length, batch=2))


@pytest.mark.parametrize("length", [1, 63, 65, 130])
def test_triton_equals_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(partial(full, form="triton"), plain, make_inputs(length, channels=3))


@pytest.mark.parametrize("packed", [False, True])
def test_triton_in_parts(packed: bool, agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_triton, "FORWARD_TILES", (4, 1))
    monkeypatch.setattr(in_triton, "BACKWARD_TILES", (2, 1))
    seen = []
    launch = in_triton.launch
    monkeypatch.setattr(in_triton, "launch", lambda *a, **k: (seen.append(k["PARTS"]), launch(*a, **k)))
    inputs = make_inputs(25, batch=2, channels=2, states=6 if packed else 2)
    more = {"cu_seqlens": cuts(0, 7, 8, 25, 36, 37, 50)} if packed else {}
    agree(partial(full, form="triton", **more), partial(plain, **more), inputs)
    assert max(seen) > 3, "the rows were cut into parts"


@in_both_forms
@pytest.mark.parametrize("decay", [0.0, 20.0, 1e3])
@pytest.mark.parametrize("log_decay", [False, True])
def test_decays_from_none_to_extreme(
    form: str, decay: float, log_decay: bool, agree: Callable[..., None], several_chunks: None
) -> None:
    inputs = make_inputs(40, channels=2, decay=decay, log_decay=log_decay)
    agree(
        partial(full, form=form, log_decay=log_decay, chunk_size=8),
        partial(plain, log_decay=log_decay),
        inputs,
    )


@in_both_forms
def test_zero_negative_and_growing_factors(
    form: str, agree: Callable[..., None], several_chunks: None
) -> None:
    inputs = make_inputs(70, channels=2)
    inputs["a"] = 1.1 * torch.randn_like(inputs["a"])
    inputs["a"][:, ::9] = 0.0
    agree(partial(full, form=form, chunk_size=8), plain, inputs)


@in_both_forms
@pytest.mark.parametrize("given", ["initial state", "final state", "neither"])
def test_either_state_alone(form: str, given: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(37, batch=2, channels=2)
    if given != "initial state":
        del inputs["initial_state"]
    final = given == "final state"
    forms = [partial(linear_recurrence, return_final_state=final, form=name) for name in (form, "reference")]
    agree(*forms, inputs)
    if final:
        forms = [lambda name=name, **kw: full(**kw, form=name)[1] for name in (form, "reference")]
        agree(*forms, inputs)


@in_both_forms
def test_strided_inputs(form: str, agree: Callable[..., None]) -> None:
    def strided(a: Tensor, b: Tensor, initial_state: Tensor) -> Any:
        both = torch.cat([a, b], 2)  # as a fused projection gives them
        a, b = both.chunk(2, 2)
        return full(a, b.mT.contiguous().mT, initial_state=initial_state.t().contiguous().t(), form=form)

    agree(strided, plain, make_inputs(37, channels=4))


@in_both_forms
@pytest.mark.parametrize("log_decay", [False, True])
@pytest.mark.parametrize("bounds", [(0, 50, 100), (0, 1, 2, 32, 50, 51, 64, 99, 100)])
def test_packed_documents_are_separate_runs(
    form: str, log_decay: bool, bounds: tuple[int, ...], agree: Callable[..., None], several_chunks: None
) -> None:
    inputs = make_inputs(50, batch=2, channels=3, log_decay=log_decay, states=len(bounds) - 1)
    options = {"log_decay": log_decay, "chunk_size": 8}

    def separately(a: Tensor, b: Tensor, initial_state: Tensor) -> Any:
        hs, finals = [], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = [v.flatten(0, 1)[None, start:end] for v in (a, b)]
            h, final = full(*part, initial_state=initial_state[i : i + 1], **options)
            hs.append(h[0])
            finals.append(final[0])
        return torch.cat(hs).view(2, 50, -1), torch.stack(finals)

    agree(partial(full, form=form, cu_seqlens=cuts(*bounds), **options), separately, inputs)


@in_both_forms
def test_nothing_leaks_into_the_next_document(form: str) -> None:
    inputs = make_inputs(100, channels=2)
    del inputs["initial_state"]
    packed = partial(linear_recurrence, cu_seqlens=cuts(0, 70, 100), form=form)
    before = packed(**inputs)
    inputs["b"][:, :70] = 1e30
    torch.testing.assert_close(packed(**inputs)[:, 70:], before[:, 70:], rtol=0, atol=0)


@in_both_forms
def test_states_hand_over(form: str, agree: Callable[..., None]) -> None:
    def in_two(a: Tensor, b: Tensor, initial_state: Tensor) -> Any:
        first, state = full(a[:, :30], b[:, :30], initial_state=initial_state, form=form)
        second, state = full(a[:, 30:], b[:, 30:], initial_state=state, form=form)
        return torch.cat([first, second], 1), state

    agree(in_two, plain, make_inputs(47, channels=2))


@in_both_forms
@pytest.mark.parametrize("log_decay", [False, True])
def test_fp32_accuracy(form: str, log_decay: bool, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(100, channels=4, decay=0.1, log_decay=log_decay, dtype=torch.float32)
    accurate(
        partial(full, form=form, log_decay=log_decay, chunk_size=16),
        partial(plain, log_decay=log_decay),
        inputs,
        FP32_FLOOR,
    )


# Triton's interpreter truncates to bf16 where a GPU rounds: the Triton form shows its accuracy in fp16.
in_half_precision = pytest.mark.parametrize(
    ("form", "dtype", "floor"),
    [
        ("torch", torch.bfloat16, BF16_FLOOR),
        ("torch", torch.float16, FP16_FLOOR),
        ("triton", torch.float16, FP16_FLOOR),
    ],
)


@in_half_precision
@pytest.mark.parametrize("channels", [3, 4])
def test_half_precision(
    form: str,
    dtype: torch.dtype,
    floor: float,
    channels: int,
    accurate: Callable[..., None],
    several_chunks: None,
) -> None:
    inputs = make_inputs(60, channels=channels, dtype=dtype)
    h, state = full(**inputs, form=form)
    assert (h.dtype, state.dtype) == (dtype, torch.float32)
    accurate(partial(full, form=form, chunk_size=8), plain, inputs, floor)


@in_half_precision
def test_decays_of_another_dtype(
    form: str, dtype: torch.dtype, floor: float, accurate: Callable[..., None]
) -> None:
    inputs = make_inputs(40, channels=4, dtype=dtype)
    inputs["a"] = torch.rand(1, 40, 4)
    assert linear_recurrence(**inputs, form=form).dtype == dtype
    accurate(partial(full, form=form), plain, inputs, floor)


def test_logarithms_tell_decays_near_one_apart() -> None:
    logs = torch.full((1, 1000, 1), -1e-3, dtype=torch.float64)
    zeros, state = torch.zeros_like(logs), torch.ones(1, 1)
    kept = logs.sum().exp()  # 0.37 of the state after 1000 tokens
    given = {"b": zeros.bfloat16(), "initial_state": state, "return_final_state": True}
    _, by_logs = linear_recurrence(logs.bfloat16(), log_decay=True, **given)
    _, by_decays = linear_recurrence(logs.exp().bfloat16(), **given)
    assert abs(by_logs.item() / kept - 1) < 5e-3
    assert by_decays.item() == 1.0


def test_autocast_leaves_the_recurrence_alone() -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(**inputs)
    assert all(torch.equal(y, z) for y, z in zip(cast, full(**inputs)))


@pytest.mark.parametrize("log_decay", [False, True])
def test_numerical_gradients(log_decay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scan.STEP_ELEMENTS, "cpu", 8)
    inputs = make_inputs(6, batch=2, channels=2, states=3, log_decay=log_decay)
    names = list(inputs)
    options = {"cu_seqlens": cuts(0, 4, 6, 12), "log_decay": log_decay, "chunk_size": 2}

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return full(**dict(zip(names, values)), **options)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    inputs = make_inputs(9, batch=2, states=3 if packed else 2)
    more = (cuts(0, 5, 9, 18) if packed else None, False, 4)
    torch.library.opcheck(linear_recurrence_op, (*(v.requires_grad_() for v in inputs.values()), *more))
    a, b, state = (v.detach() for v in inputs.values())
    h, final = linear_recurrence_op(a, b, state, *more)
    torch.library.opcheck(linear_recurrence_backward_op, (b, final, a, h, state, *more))


@pytest.mark.parametrize(
    "op",
    [in_triton.linear_recurrence_op, in_triton.linear_recurrence_backward_op],
    ids=["forward", "backward"],
)
def test_registration_of_the_triton_form(op: Any) -> None:
    a, b, state = make_inputs(5, channels=2).values()
    backward = op is in_triton.linear_recurrence_backward_op
    arguments = (b, state, a, b, state) if backward else (a.requires_grad_(), b, state)
    torch.library.opcheck(op, (*arguments, None, False, 64))


def test_meta_tensors() -> None:
    inputs = {k: v.to("meta").requires_grad_() for k, v in make_inputs(100).items()}
    h, state = full(**inputs)
    assert (h.shape, state.shape) == (inputs["b"].shape, inputs["initial_state"].shape)
    (h.sum() + state.sum()).backward()
    assert all(v.grad.shape == v.shape for v in inputs.values())


def test_saves_decays_and_its_result_only() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(128, dtype=torch.bfloat16).items()}
    saved: dict[int, int] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t
    )
    with hooks:
        h, _ = full(**inputs)
    del inputs["b"]
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in (*inputs.values(), h)}
    assert saved == kept


def parameters_in_fla(module: str, function: str) -> set[str]:
    """Read from the source: importing fla takes many seconds."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "ops" / "hgrn" / f"{module}.py"
    nodes = [n for n in ast.parse(source.read_text()).body if isinstance(n, ast.FunctionDef)]
    (found,) = (n for n in nodes if n.name == function)
    return {argument.arg for argument in found.args.args}


def test_the_adapter_names_what_fla_takes(peers: None) -> None:
    a, b, state = make_inputs(8, batch=2, states=3, dtype=torch.float32).values()
    options = {"initial_state": None, "cu_seqlens": None, "with_final_state": False}
    name, given = external.arguments(a, b, **options)
    assert (name, set(given)) == ("chunk_hgrn", {"x", "g"})
    assert set(given) <= parameters_in_fla("chunk", name)
    options = {"initial_state": state, "cu_seqlens": cuts(0, 3, 8, 16), "with_final_state": True}
    name, given = external.arguments(a, b, **options)
    assert set(given) == parameters_in_fla("fused_recurrent", name)
    assert (name, given["x"].shape, given["g"].shape) == ("fused_recurrent_hgrn", (1, 16, 5), (1, 16, 5))
    assert given["cu_seqlens"].dtype == torch.int64


@pytest.mark.parametrize(
    ("dtype", "change", "reason"),
    [
        (torch.float32, {"log_decay": False}, "takes logarithms of decays"),
        (torch.float64, {}, "states in float32"),
        (torch.bfloat16, {"with_final_state": True}, "final states in torch.bfloat16"),
        (torch.bfloat16, {}, None),
    ],
)
def test_what_fla_lacks(dtype: torch.dtype, change: dict[str, Any], reason: str | None) -> None:
    a, b, _ = make_inputs(8, dtype=dtype).values()
    options = {"initial_state": None, "cu_seqlens": None, "chunk_size": 64, "with_final_state": False}
    found = limits.fla_lacks(a, b, **{**options, "log_decay": True, **change})
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(6, 5)}, r"a and b must both be \(B, T, D\); they are \(6, 5\) and \(1, 6, 5\)"),
        ({"b": torch.zeros(1, 6, 4)}, r"must both be \(B, T, D\)"),
        ({"a": torch.ones(1, 6, 5, dtype=torch.int64)}, "a must be floating, it is torch.int64"),
        ({"a": torch.zeros(1, 6, 5, device="meta")}, "b is on cpu and a on meta"),
        ({"a": torch.zeros(1, 0, 5), "b": torch.zeros(1, 0, 5)}, "has no tokens"),
        ({"initial_state": torch.zeros(2, 5)}, r"initial_state must be \(1, 5\), it is \(2, 5\)"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        ({"form": "fast"}, "form='fast' does not exist"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**{**make_inputs(6), **change})


def test_fla_needs_a_gpu_or_its_package() -> None:
    with pytest.raises(RuntimeError, match=r"form='fla' cannot run on cpu"):
        linear_recurrence(**make_inputs(6), form="fla")
