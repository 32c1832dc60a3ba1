"""WKV: the linear-time form against the formula, states, packing, registration, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import wkv
from triptych.kernels.wkv import scan
from triptych.kernels.wkv import triton as with_triton
from triptych.kernels.wkv.torch import wkv_backward_op, wkv_op

FP32_FLOOR = 3e-6  # a sum of some hundred fp32 terms
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8


def make_inputs(
    length: int,
    *,
    batch: int = 1,
    channels: int = 6,
    decay: float = 5.0,
    key: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Inputs of `wkv`: k of size `key`, w between -decay and decay."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "k": key * torch.randn(batch, length, channels, dtype=dtype),
        "v": torch.randn(batch, length, channels, dtype=dtype),
        "w": torch.linspace(-decay, decay, channels, dtype=wide),
        "u": torch.randn(channels, dtype=wide),
    }


def with_state(inputs: dict[str, Tensor], count: int = 0) -> dict[str, Tensor]:
    k = inputs["k"]
    return inputs | {
        "initial_state": torch.randn(count or k.shape[0], 2, k.shape[2], dtype=inputs["w"].dtype)
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


plain = partial(wkv, form="reference")
causal = partial(wkv, bidirectional=False, return_final_state=True)
plain_causal = partial(causal, form="reference")


@pytest.mark.parametrize("form", ["torch", "triton", "reference"])
def test_all_forms_equal_the_formula_term_by_term(form: str) -> None:
    inputs = make_inputs(9, channels=2)
    k, v, w, u = (x.tolist() for x in inputs.values())
    expected = torch.zeros(1, 9, 2, dtype=torch.float64)
    for t, channel in itertools.product(range(9), range(2)):
        weights = [
            math.exp(k[0][i][channel] + (u[channel] if i == t else -(abs(t - i) - 1) / 9 * w[channel]))
            for i in range(9)
        ]
        values = [v[0][i][channel] for i in range(9)]
        expected[0, t, channel] = sum(a * b for a, b in zip(weights, values)) / sum(weights)
    torch.testing.assert_close(wkv(**inputs, form=form), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", ["torch", "triton", "reference"])
def test_causal_forms_equal_the_recurrence_of_rwkv_4(form: str) -> None:
    inputs = make_inputs(9, channels=2, decay=1.0)
    k, v, w, u = inputs.values()
    a = b = torch.zeros(1, 2, dtype=torch.float64)
    expected = []
    for t in range(9):
        own = torch.exp(u + k[:, t])
        expected.append((a + own * v[:, t]) / (b + own))
        a = torch.exp(-w) * a + torch.exp(k[:, t]) * v[:, t]
        b = torch.exp(-w) * b + torch.exp(k[:, t])
    y, state = causal(**inputs, form=form)
    torch.testing.assert_close(y, torch.stack(expected, 1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, torch.stack([a / b, b.log()], 1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 500])
def test_agrees_with_the_formula(length: int, agree: Callable[..., None]) -> None:
    agree(wkv, plain, make_inputs(length, channels=3 if length > 100 else 6, batch=2))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 65, 300])
def test_causal_agrees_with_the_formula(length: int, agree: Callable[..., None]) -> None:
    agree(causal, plain_causal, with_state(make_inputs(length, decay=1.0, channels=3, batch=2)))


@pytest.mark.parametrize(("length", "channels"), [(1, 3), (5, 35), (65, 2)])
def test_triton_agrees_with_the_formula(length: int, channels: int, agree: Callable[..., None]) -> None:
    agree(partial(wkv, form="triton"), plain, make_inputs(length, channels=channels))


@pytest.mark.parametrize(("length", "decay"), [(1, 1.0), (63, 1.0), (6, 0.0), (6, 20.0), (6, 1000.0)])
def test_triton_agrees_causally(length: int, decay: float, agree: Callable[..., None]) -> None:
    inputs = with_state(make_inputs(length, decay=decay, channels=3))
    agree(partial(causal, form="triton"), plain_causal, inputs, max(1e-12, 1e-15 * length * decay))


def test_triton_takes_strided_inputs(agree: Callable[..., None]) -> None:
    def strided(k: Tensor, v: Tensor, **rest: Tensor) -> Tensor:
        return wkv(k.mT.contiguous().mT, v.repeat(1, 1, 2)[..., 3:6], form="triton", **rest)

    agree(strided, plain, make_inputs(6, batch=2, channels=3))


@pytest.mark.parametrize(("bidirectional", "states"), [(True, False), (False, False), (False, True)])
def test_packed_documents_in_triton(bidirectional: bool, states: bool, agree: Callable[..., None]) -> None:
    inputs = make_inputs(7, batch=2, channels=3, decay=1.0)
    packed: Any = partial(wkv, bidirectional=bidirectional, cu_seqlens=cuts(0, 1, 4, 7, 14))
    if states:
        packed, inputs = partial(packed, return_final_state=True), with_state(inputs, 4)
    if bidirectional:
        packed = partial(packed, divide_u=True)
    agree(partial(packed, form="triton"), partial(packed, form="reference"), inputs)


def test_accuracy_of_triton(accurate: Callable[..., None]) -> None:
    triton = partial(wkv, form="triton")
    accurate(triton, plain, make_inputs(12, channels=3, key=10.0, dtype=torch.float32), 1e-5)
    accurate(triton, plain, make_inputs(6, channels=3, dtype=torch.bfloat16), BF16_FLOOR)


def test_empty_states_and_large_keys_in_triton() -> None:
    inputs = make_inputs(6, decay=1.0, channels=3, dtype=torch.float32)
    inputs["k"] = 80.0 * inputs["k"].sign()
    empty = torch.stack([torch.zeros(1, 3), torch.full((1, 3), -math.inf)], 1).requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    triton = partial(causal, form="triton")
    found, expected = triton(**leaves, initial_state=empty), triton(**leaves)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    (found[0].sum() + found[1].sum()).backward()
    assert all(v.grad.isfinite().all() for v in leaves.values())
    assert torch.equal(empty.grad, torch.zeros_like(empty))


@pytest.mark.parametrize("form", [wkv, plain])
def test_u_may_be_divided_by_the_length(form: Any, agree: Callable[..., None]) -> None:
    def by_hand(u: Tensor, **rest: Tensor) -> Tensor:
        return form(u=u / 40, **rest)

    agree(partial(form, divide_u=True), by_hand, make_inputs(40))


@pytest.mark.parametrize("elements", [1, 100, 200, 1 << 20])
def test_tiles_of_rows_and_channels(
    elements: int, agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scan.TILE_ELEMENTS, "cpu", elements)
    agree(wkv, plain, make_inputs(40, batch=3, channels=5))
    agree(causal, plain_causal, with_state(make_inputs(40, batch=3, channels=5, decay=1.0)))


@pytest.mark.parametrize("decay", [0.0, 1e-3, 20.0, 300.0])
def test_decays_of_either_sign_from_none_to_extreme(decay: float, agree: Callable[..., None]) -> None:
    # Exponents of 130 * decay are rounded, in both forms.
    tolerance = max(1e-12, 1e-15 * 130 * decay)
    agree(wkv, plain, make_inputs(130, decay=130 * decay, channels=3), tolerance)
    agree(causal, plain_causal, make_inputs(130, decay=decay, channels=3), tolerance)


@pytest.mark.parametrize("size", [10.0, 80.0, 800.0])
def test_large_keys(size: float, agree: Callable[..., None]) -> None:
    inputs = make_inputs(130, channels=3)
    inputs["k"] = size * (2 * torch.rand_like(inputs["k"]) - 1)
    # Rounding of an exponent of 800 is 1e-13.
    agree(wkv, plain, inputs, tolerance=1e-15 * max(1000, 10 * size))
    agree(causal, plain_causal, inputs, tolerance=1e-15 * max(1000, 10 * size))


def test_large_keys_in_fp32_stay_finite() -> None:
    inputs = make_inputs(130, dtype=torch.float32)
    inputs["k"] = 80.0 * inputs["k"].sign()
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    y = wkv(**leaves)
    y.sum().backward()
    assert y.isfinite().all()
    assert y.abs().max() <= inputs["v"].abs().max() * (1 + 1e-5), "y is a mean of v"
    assert all(v.grad.isfinite().all() for v in leaves.values())


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 256])
def test_chunk_size_does_not_matter(chunk_size: int, agree: Callable[..., None]) -> None:
    agree(partial(wkv, chunk_size=chunk_size), wkv, make_inputs(150, batch=2))
    inputs = with_state(make_inputs(150, batch=2, decay=1.0))
    agree(partial(causal, chunk_size=chunk_size), causal, inputs)


@pytest.mark.parametrize("divide_u", [False, True])
@pytest.mark.parametrize(
    "bounds", [(0, 100, 200), (0, 1, 2, 64, 100, 131, 200), (0, 31, 64, 96, 100, 199, 200)]
)
def test_packed_documents_are_separate_runs(
    bounds: tuple[int, ...], divide_u: bool, agree: Callable[..., None]
) -> None:
    def separately(k: Tensor, v: Tensor, **rest: Tensor) -> Tensor:
        ys = []
        for start, end in itertools.pairwise(bounds):
            part = (x.flatten(0, 1)[None, start:end] for x in (k, v))
            ys.append(wkv(*part, **rest, divide_u=divide_u)[0])
        return torch.cat(ys).view(k.shape)

    packed = partial(wkv, divide_u=divide_u, cu_seqlens=cuts(*bounds))
    agree(packed, separately, make_inputs(100, batch=2))
    agree(partial(packed, form="reference"), separately, make_inputs(100, batch=2))


@pytest.mark.parametrize("states", [False, True])
def test_packed_causal_documents(states: bool, agree: Callable[..., None]) -> None:
    bounds = cuts(0, 3, 64, 100, 129, 150, 200)
    inputs = make_inputs(100, batch=2, decay=1.0)
    if states:
        first, second = (partial(f, cu_seqlens=bounds) for f in (causal, plain_causal))
        agree(first, second, with_state(inputs, 6))
    else:
        packed = partial(wkv, bidirectional=False, cu_seqlens=bounds)
        agree(packed, partial(packed, form="reference"), inputs)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_nothing_leaks_into_other_documents(bidirectional: bool) -> None:
    inputs = make_inputs(100)
    packed = partial(wkv, bidirectional=bidirectional, cu_seqlens=cuts(0, 30, 70, 100))
    before = packed(**inputs)
    inputs["k"][:, 30:70] = 1e4
    inputs["v"][:, 30:70] = 1e30
    after = packed(**inputs)
    for part in (slice(0, 30), slice(70, 100)):
        torch.testing.assert_close(after[:, part], before[:, part], rtol=0, atol=0)


def test_states_hand_over(agree: Callable[..., None]) -> None:
    def in_two(k: Tensor, v: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        state = rest.pop("initial_state")
        first, state = causal(k[:, :70], v[:, :70], initial_state=state, **rest)
        second, state = causal(k[:, 70:], v[:, 70:], initial_state=state, **rest)
        return torch.cat([first, second], 1), state

    agree(in_two, causal, with_state(make_inputs(111, batch=2, decay=1.0)))


def test_tokens_one_by_one_give_the_same() -> None:
    inputs = make_inputs(20, batch=2, decay=1.0)
    y, final_state = causal(**inputs)
    k, v, w, u = inputs.values()
    state = None
    for t in range(20):
        y_t, state = causal(k[:, t : t + 1], v[:, t : t + 1], w, u, initial_state=state)
        torch.testing.assert_close(y_t[:, 0], y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


def test_the_empty_state_is_none() -> None:
    inputs = make_inputs(40, batch=2, decay=1.0)
    empty = torch.stack([torch.zeros(2, 6), torch.full((2, 6), -math.inf)], 1).double().requires_grad_()
    found, expected = causal(**inputs, initial_state=empty), causal(**inputs)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found[0].sum() + found[1].sum(), empty)
    assert torch.equal(gradient, torch.zeros_like(empty))


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_gradients(which: int, agree: Callable[..., None]) -> None:
    def only(form: str) -> Callable[..., Tensor]:
        return lambda u, **rest: causal(u=u, form=form, **rest)[which] + 0 * u.sum()

    agree(only("torch"), only("reference"), with_state(make_inputs(70, decay=1.0)))


# Exponents of 40 to base e are of 58 to base 2, each rounded by 2e-6 a few times over.
@pytest.mark.parametrize(("key", "floor"), [(1.0, FP32_FLOOR), (10.0, 1e-5)])
def test_fp32_accuracy(key: float, floor: float, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(300, channels=3, key=key, dtype=torch.float32)
    accurate(wkv, plain, inputs, floor)
    inputs["w"] = inputs["w"].abs() / 5
    accurate(causal, plain_causal, with_state(inputs), floor)


def test_rounding_does_not_add_up_over_a_long_row() -> None:
    inputs = make_inputs(4000, channels=3, key=5.0, decay=1.0, dtype=torch.float32)
    inputs["w"] = inputs["w"].abs() / 100
    y, state = causal(**inputs)
    exact_y, exact_state = causal(**{k: v.double() for k, v in inputs.items()})
    torch.testing.assert_close(y.double(), exact_y, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.double(), exact_state, rtol=0, atol=1e-5)


def test_bf16_inputs(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(200, channels=3, dtype=torch.bfloat16)
    assert wkv(**inputs).dtype == torch.bfloat16
    assert causal(**inputs)[1].dtype == torch.float32
    accurate(wkv, plain, inputs, BF16_FLOOR)


def test_autocast_leaves_it_alone() -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = wkv(**inputs)
    assert torch.equal(cast, wkv(**inputs))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_numerical_gradients(bidirectional: bool) -> None:
    inputs = make_inputs(5, channels=2)
    inputs = inputs if bidirectional else with_state(inputs)
    names = list(inputs)

    def function(*values: Tensor) -> Any:
        form = wkv if bidirectional else causal
        return form(**dict(zip(names, values)), chunk_size=2)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


def op_arguments(bidirectional: bool, packed: bool, length: int = 9) -> tuple[Any, ...]:
    inputs = make_inputs(length, batch=2, channels=3)
    inputs = inputs if bidirectional else with_state(inputs)
    values = [v.requires_grad_() for v in inputs.values()]
    place = torch.arange(length).expand(2, length) % 4
    extra = (
        [torch.full((2, length), 0.25), place == 0, (place == 3) | (torch.arange(length) == length - 1)]
        if packed
        else [None] * 3
    )
    return (*values, *[None] * bidirectional, *extra, packed, bidirectional, 4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_registration_of_triton(bidirectional: bool) -> None:
    arguments = op_arguments(bidirectional, packed=bidirectional, length=3)
    forward, backward = with_triton.wkv_op, with_triton.wkv_backward_op
    # Further utilities trace the op once more each, which takes its time under the interpreter.
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, arguments, test_utils=utilities)
    detached = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    y, final_state = forward(*detached)
    state = None if bidirectional else final_state
    torch.library.opcheck(backward, (y, state, *detached), test_utils=utilities)
    with FlopCounterMode(display=False) as counter:
        forward(*arguments)[0].sum().backward()
    assert counter.get_total_flops() == 20 * 2 * 3 * 3 * (2 if bidirectional else 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_registration(bidirectional: bool, packed: bool) -> None:
    arguments = op_arguments(bidirectional, packed)
    torch.library.opcheck(wkv_op, arguments)
    detached = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    y, final_state = wkv_op(*detached)
    torch.library.opcheck(wkv_backward_op, (y, None if bidirectional else final_state, *detached))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_flops_count_tokens_channels_and_directions(bidirectional: bool) -> None:
    arguments = op_arguments(bidirectional, packed=False)
    with FlopCounterMode(display=False) as counter:
        y, _ = wkv_op(*arguments)
        forward = counter.get_total_flops()
        y.sum().backward()
    elements = 2 * 9 * 3 * (2 if bidirectional else 1)
    assert (forward, counter.get_total_flops() - forward) == (4 * elements, 16 * elements)


def test_meta_tensors() -> None:
    inputs = {k: v.to("meta").requires_grad_() for k, v in make_inputs(100).items()}
    y = wkv(**inputs)
    assert y.shape == inputs["v"].shape
    y.sum().backward()
    assert all(v.grad.shape == v.shape for v in inputs.values())
    assert causal(**inputs)[1].shape == (1, 2, 6)


def test_saves_inputs_only() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(128, batch=2).items()}
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        wkv(**inputs)
    given = {v.data_ptr() for v in inputs.values()}
    assert all(t.numel() <= 6 for t in saved if t.data_ptr() not in given), "w / T, and nothing larger"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(6, 3)}, r"k and v must both be \(B, T, C\)"),
        ({"k": torch.zeros(1, 0, 6), "v": torch.zeros(1, 0, 6)}, "has no tokens"),
        ({"w": torch.zeros(5)}, r"w must be \(C,\) = \(6,\), it is \(5,\)"),
        ({"u": torch.zeros(5)}, r"u must be \(C,\) = \(6,\)"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        ({"return_final_state": True}, "leave initial_state and return_final_state out"),
        ({"initial_state": torch.zeros(1, 2, 6)}, "or use bidirectional=False"),
        ({"bidirectional": False, "initial_state": torch.zeros(2, 2, 6)}, r"must be \(1, 2, 6\)"),
        ({"bidirectional": False, "divide_u": True}, "use divide_u=False"),
        ({"form": "fast"}, r"form='fast' does not exist; use one of \['triton', 'torch', 'reference'\]"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wkv(**{**make_inputs(6), **change})
