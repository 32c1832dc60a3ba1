"""Selective scan: the form in blocks against the recurrence, states, packing, registration, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import selective_scan, selective_scan_step
from triptych.kernels.selective_scan import external, limits, scan
from triptych.kernels.selective_scan import triton as triton_form
from triptych.kernels.selective_scan.torch import selective_scan_backward_op, selective_scan_op

FP32_FLOOR = 2e-6  # a sum of some hundred fp32 terms
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
FP16_FLOOR = 1e-3  # and 2^-11 to fp16


def make_inputs(
    length: int,
    *,
    batch: int = 1,
    channels: int = 6,
    state: int = 5,
    decay: float = 1.0,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of `selective_scan`, with an initial state for each of `states` documents (or each row)."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(batch, length, channels, dtype=dtype),
        "dt": torch.randn(batch, length, channels, dtype=dtype),
        "a": -decay * torch.rand(channels, state, dtype=wide),
        "b": torch.randn(batch, length, state, dtype=dtype),
        "c": torch.randn(batch, length, state, dtype=dtype),
        "d": torch.randn(channels, dtype=wide),
        "z": torch.randn(batch, length, channels, dtype=dtype),
        "dt_bias": torch.randn(channels, dtype=wide),
        "initial_state": torch.randn(states or batch, channels, state, dtype=wide),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


full = partial(selective_scan, return_final_state=True)
plain = partial(full, form="reference")


in_triton = partial(full, form="triton")


def by_definition(inputs: dict[str, Tensor]) -> Tensor:
    """y of one row, one channel and state at a time, as sums over the tokens before: no recurrence."""
    x, dt, a, b, c, d, z, bias, h0 = (v.double() for v in inputs.values())
    s = torch.log1p(torch.exp(dt + bias))
    y = d * x
    for channel, state in itertools.product(range(x.shape[2]), range(a.shape[1])):
        total = (s[0, :, channel] * a[channel, state]).cumsum(0)  # log decay up to and with each token
        between = (total.unsqueeze(1) - total).tril()
        weights = between.exp().tril() * (s * x)[0, :, channel] * b[0, :, state]
        carried = total.exp() * h0[0, channel, state]
        y[0, :, channel] += c[0, :, state] * (weights.sum(1) + carried)
    return y * z / (1 + torch.exp(-z))


@pytest.mark.parametrize("form", ["torch", "reference"])
def test_forms_equal_the_definition(form: str) -> None:
    inputs = make_inputs(70)
    expected = by_definition(inputs)
    torch.testing.assert_close(selective_scan(**inputs, form=form), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500])
def test_agrees_with_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(full, plain, make_inputs(length, batch=2))


@pytest.mark.parametrize(("batch", "channels", "state"), [(3, 1, 9), (1, 11, 1), (5, 4, 3)])
def test_odd_sizes(batch: int, channels: int, state: int, agree: Callable[..., None]) -> None:
    inputs = make_inputs(37, batch=batch, channels=channels, state=state)
    agree(partial(full, chunk_size=8), plain, inputs)


@pytest.mark.parametrize("elements", [1, 40, 90, 1 << 20])
def test_tiles_of_rows_and_channels(
    elements: int, agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scan.STEP_ELEMENTS, "cpu", elements)
    agree(full, plain, make_inputs(40, batch=3, channels=7))


@pytest.mark.parametrize("decay", [0.0, 1e-4, 20.0, 1e3, 1e6])
def test_decays_from_none_to_extreme(decay: float, agree: Callable[..., None]) -> None:
    # In softplus space dt is of order 1, so that decay is about the exponent of one step.
    agree(full, plain, make_inputs(130, decay=decay))


def test_extreme_steps_among_mild_ones(agree: Callable[..., None]) -> None:
    inputs = make_inputs(130)
    inputs["dt"][:, 40] = 1e5
    inputs["dt"][:, 70:75] = -1e3
    agree(full, plain, inputs)


def test_strided_inputs(agree: Callable[..., None]) -> None:
    def strided(x: Tensor, dt: Tensor, b: Tensor, **rest: Tensor) -> Any:
        return full(x=x.mT.contiguous().mT, dt=dt.mT.contiguous().mT, b=b.mT.contiguous().mT, **rest)

    agree(strided, full, make_inputs(70, batch=2))


@pytest.mark.parametrize("omitted", ["d", "z", "dt_bias", "initial_state"])
def test_optional_inputs(omitted: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(70)
    del inputs[omitted]
    agree(full, plain, inputs)


def test_time_steps_as_they_are(agree: Callable[..., None]) -> None:
    inputs = make_inputs(70)
    inputs["dt"] = inputs["dt"].exp()
    inputs["dt_bias"] = inputs["dt_bias"].exp()
    agree(partial(full, dt_softplus=False), partial(plain, dt_softplus=False), inputs)
    steps = F.softplus(inputs["dt"] + inputs["dt_bias"])
    rest = {k: v for k, v in inputs.items() if k not in ("dt", "dt_bias")}
    torch.testing.assert_close(full(dt=steps, dt_softplus=False, **rest), full(**inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_gradients(which: int, agree: Callable[..., None]) -> None:
    def only(form: str) -> Callable[..., Tensor]:
        # The final state does not depend on c, d and z, which then get zeros.
        return lambda c, d, z, **rest: (
            full(c=c, d=d, z=z, form=form, **rest)[which] + 0 * (c.sum() + d.sum() + z.sum())
        )

    agree(only("torch"), only("reference"), make_inputs(70))


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 256])
def test_chunk_size_does_not_matter(chunk_size: int, agree: Callable[..., None]) -> None:
    agree(partial(full, chunk_size=chunk_size), full, make_inputs(150, batch=2))


@pytest.mark.parametrize("bounds", [(0, 100, 200), (0, 1, 2, 64, 100, 131, 200), (0, 63, 100, 164, 165, 200)])
def test_packed_documents_are_separate_runs(bounds: tuple[int, ...], agree: Callable[..., None]) -> None:
    inputs = make_inputs(100, batch=2, states=len(bounds) - 1)

    def separately(initial_state: Tensor, a: Tensor, d: Tensor, dt_bias: Tensor, **by_token: Tensor) -> Any:
        ys, finals = [], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = {k: v.flatten(0, 1)[None, start:end] for k, v in by_token.items()}
            y, final = full(**part, a=a, d=d, dt_bias=dt_bias, initial_state=initial_state[i : i + 1])
            ys.append(y[0])
            finals.append(final[0])
        return torch.cat(ys).view(2, 100, -1), torch.stack(finals)

    agree(partial(full, cu_seqlens=cuts(*bounds)), separately, inputs)


def test_packed_without_states(agree: Callable[..., None]) -> None:
    inputs = make_inputs(150, batch=2)
    del inputs["initial_state"]
    packed = partial(selective_scan, cu_seqlens=cuts(0, 3, 64, 128, 129, 150, 222, 300))
    agree(packed, partial(packed, form="reference"), inputs)


def test_nothing_leaks_into_the_next_document() -> None:
    inputs = make_inputs(100)
    del inputs["initial_state"]
    packed = partial(selective_scan, cu_seqlens=cuts(0, 70, 100))
    before = packed(**inputs)
    inputs["x"][:, :70] = 1e30
    torch.testing.assert_close(packed(**inputs)[:, 70:], before[:, 70:], rtol=0, atol=0)


def test_states_hand_over(agree: Callable[..., None]) -> None:
    def in_two(initial_state: Tensor, a: Tensor, d: Tensor, dt_bias: Tensor, **by_token: Tensor) -> Any:
        head = {k: v[:, :70] for k, v in by_token.items()}
        tail = {k: v[:, 70:] for k, v in by_token.items()}
        first, state = full(**head, a=a, d=d, dt_bias=dt_bias, initial_state=initial_state)
        second, state = full(**tail, a=a, d=d, dt_bias=dt_bias, initial_state=state)
        return torch.cat([first, second], 1), state

    agree(in_two, full, make_inputs(111, batch=2))


@pytest.mark.parametrize("omitted", [(), ("d", "z", "dt_bias")])
def test_steps_give_the_same(omitted: tuple[str, ...]) -> None:
    inputs = {k: v for k, v in make_inputs(20, batch=2).items() if k not in omitted}
    y, final_state = full(**inputs)
    state = inputs.pop("initial_state")
    by_token = {k: inputs.pop(k) for k in ("x", "dt", "b", "c", "z") if k in inputs}
    for t in range(20):
        y_t, state = selective_scan_step(state, **{k: v[:, t] for k, v in by_token.items()}, **inputs)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.1, 10.0])
def test_fp32_accuracy(decay: float, accurate: Callable[..., None]) -> None:
    accurate(full, plain, make_inputs(300, decay=decay, dtype=torch.float32), FP32_FLOOR)


def test_bf16_inputs(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(200, dtype=torch.bfloat16)
    y, state = full(**inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    accurate(full, plain, inputs, BF16_FLOOR)


def test_autocast_leaves_the_scan_alone() -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(**inputs)
    assert all(torch.equal(y, z) for y, z in zip(cast, full(**inputs)))


def test_numerical_gradients() -> None:
    inputs = make_inputs(5, channels=2, state=2)
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return full(**dict(zip(names, values)), chunk_size=2)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


@pytest.mark.parametrize("length", [1, 63, 65])
def test_triton_equals_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(in_triton, plain, make_inputs(length, channels=2, state=1), 1e-11)


@pytest.mark.parametrize(
    ("bounds", "omitted"), [((0, 1, 8, 9, 18), ()), ((0, 9, 18), ("d", "z", "dt_bias", "initial_state"))]
)
@pytest.mark.parametrize("softplus", [True, False])
def test_triton_with_packed_documents(
    bounds: tuple[int, ...], omitted: tuple[str, ...], softplus: bool, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(9, batch=2, channels=3, state=2, states=len(bounds) - 1)
    if not softplus:
        inputs["dt"], inputs["dt_bias"] = inputs["dt"].exp(), inputs["dt_bias"].exp()
    inputs = {k: v for k, v in inputs.items() if k not in omitted}
    options = {"cu_seqlens": cuts(*bounds), "dt_softplus": softplus, "chunk_size": 4}
    agree(partial(in_triton, **options), partial(plain, **options), inputs, 1e-11)


@pytest.mark.parametrize("packed", [False, True])
def test_triton_in_parts(packed: bool, agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_form, "FORWARD_TOKENS", 2)
    monkeypatch.setattr(triton_form, "BACKWARD_TOKENS", 1)
    seen = []
    launch = triton_form.launch
    monkeypatch.setattr(triton_form, "launch", lambda *a, **k: (seen.append(k["PARTS"]), launch(*a, **k)))
    inputs = make_inputs(15, channels=1, state=1, states=2 if packed else 1)
    more = {"cu_seqlens": cuts(0, 7, 15)} if packed else {}
    agree(partial(in_triton, chunk_size=2, **more), partial(plain, **more), inputs, 1e-11)
    assert min(seen) == 2, "rows were cut into parts, forward and backward"


@pytest.mark.parametrize("decay", [0.0, 1e3])
def test_triton_with_decays_from_none_to_extreme(decay: float, agree: Callable[..., None]) -> None:
    inputs = make_inputs(20, channels=2, state=2, decay=decay)
    inputs["dt"][:, 5], inputs["dt"][:, 9:11] = 1e5, -1e3
    agree(in_triton, plain, inputs, 1e-11)


def test_triton_hands_states_over_and_takes_strides(agree: Callable[..., None]) -> None:
    def in_two(initial_state: Tensor, a: Tensor, d: Tensor, dt_bias: Tensor, **by_token: Tensor) -> Any:
        by_token = {k: torch.cat([v, v], 2).chunk(2, 2)[0] for k, v in by_token.items()}
        by_token["dt"] = by_token["dt"].mT.contiguous().mT
        head = {k: v[:, :9] for k, v in by_token.items()}
        tail = {k: v[:, 9:] for k, v in by_token.items()}
        first, state = in_triton(**head, a=a, d=d, dt_bias=dt_bias, initial_state=initial_state)
        second, state = in_triton(**tail, a=a, d=d, dt_bias=dt_bias, initial_state=state)
        return torch.cat([first, second], 1), state

    agree(in_two, plain, make_inputs(20, channels=3, state=2), 1e-11)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.float16, FP16_FLOOR)])
def test_triton_accuracy(dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    # Triton's interpreter truncates to bf16 where a GPU rounds; fp16 it rounds.
    inputs = make_inputs(24, channels=3, state=2, dtype=dtype)
    y, state = in_triton(**inputs)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    accurate(in_triton, plain, inputs, floor)


@pytest.mark.parametrize("packed", [False, True])
def test_registration_of_the_triton_form(packed: bool) -> None:
    inputs = [v.detach() for v in make_inputs(4, channels=2, state=1, states=2 if packed else 1).values()]
    more = (cuts(0, 3, 4) if packed else None, True, 4)
    leaves = [inputs[0].clone().requires_grad_(), *inputs[1:]]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_form.selective_scan_op, (*leaves, *more), test_utils=tests)
    y, final_state, states = triton_form.selective_scan_op(*inputs, *more)
    arguments = (y, final_state, *inputs, states, *more)
    torch.library.opcheck(triton_form.selective_scan_backward_op, arguments, test_utils=tests)


def test_triton_refuses_many_states() -> None:
    with pytest.raises(ValueError, match="65 states per channel, more than registers hold; at most 64"):
        in_triton(**make_inputs(4, channels=2, state=65))


def test_the_adapter_calls_selective_scan_fn() -> None:
    def selective_scan_fn(  # the published signature, for batches with the time last
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:
        step = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
        h, ys = torch.zeros(u.shape[0], *A.shape), []
        for t in range(u.shape[2]):
            h = h * torch.exp(step[:, :, t, None] * A) + (step * u)[:, :, t, None] * B[:, None, :, t]
            ys.append((h * C[:, None, :, t]).sum(-1))
        y = (torch.stack(ys, 2) + D[:, None] * u) * F.silu(z)
        return (y, h) if return_last_state else y

    inputs = make_inputs(12, batch=2, dtype=torch.float32)
    del inputs["initial_state"]
    expected = plain(**inputs)
    given = external.arguments(**inputs, dt_softplus=True, with_final_state=True)
    assert all(v.is_contiguous() for v in given.values() if isinstance(v, Tensor))
    y, state = selective_scan_fn(**given)
    torch.testing.assert_close((y.transpose(1, 2), state), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"cu_seqlens": cuts(0, 8)}, "knows no packed documents"),
        ({"initial_state": torch.zeros(1, 6, 5)}, "takes no initial state"),
        ({"a": torch.zeros(6, 257)}, "up to 256 states per channel, a has 257"),
        ({"x": torch.zeros(1, 8, 6, dtype=torch.float64)}, "has no double precision"),
        ({"z": torch.zeros(1, 8, 6, dtype=torch.bfloat16)}, "wants dt, b, c and z in x's torch.float32"),
    ],
)
def test_what_mamba_ssm_lacks(change: dict[str, Any], reason: str | None) -> None:
    inputs = {**make_inputs(8, dtype=torch.float32), "initial_state": None, "cu_seqlens": None, **change}
    found = limits.mamba_ssm_lacks(**inputs)
    assert found is None if reason is None else reason in found


def op_arguments(packed: bool) -> tuple[Any, ...]:
    inputs = make_inputs(9, batch=2, channels=3, state=2, states=4 if packed else 2)
    cu_seqlens = cuts(0, 4, 9, 10, 18) if packed else None
    return (*(v.requires_grad_() for v in inputs.values()), cu_seqlens, True, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    arguments = op_arguments(packed)
    torch.library.opcheck(selective_scan_op, arguments)
    detached = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    *inputs, cu_seqlens, softplus, size = detached
    y, final_state, states = selective_scan_op(*detached)
    torch.library.opcheck(
        selective_scan_backward_op, (y, final_state, *inputs, states, cu_seqlens, softplus, size)
    )


def test_flops_count_tokens_channels_and_states() -> None:
    arguments = op_arguments(packed=False)
    with FlopCounterMode(display=False) as counter:
        y, *_ = selective_scan_op(*arguments)
        forward = counter.get_total_flops()
        y.sum().backward()
    elements = 2 * 9 * 3 * 2
    assert (forward, counter.get_total_flops() - forward) == (6 * elements, 20 * elements)


def test_meta_tensors() -> None:
    inputs = {k: v.to("meta").requires_grad_() for k, v in make_inputs(100).items()}
    y, state = full(**inputs)
    assert y.shape == inputs["x"].shape
    assert state.shape == inputs["initial_state"].shape
    (y.sum() + state.sum()).backward()
    assert all(v.grad.shape == v.shape for v in inputs.values())


def test_saves_inputs_and_block_states_only() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(128).items()}
    saved: dict[int, int] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t.numel()}) or t, lambda t: t
    )
    with hooks:
        y = selective_scan(**inputs)
    given = {v.data_ptr() for v in inputs.values()}
    assert y.data_ptr() not in saved
    (states,) = (size for pointer, size in saved.items() if pointer not in given)
    assert states == inputs["a"].numel() * 128 / 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 3)}, r"x must be \(B, T, D\)"),
        ({"x": torch.zeros(1, 0, 6)}, "has no tokens"),
        ({"dt": torch.zeros(1, 6, 3)}, r"dt must be \(B, T, D\) = \(1, 6, 6\)"),
        ({"z": torch.zeros(1, 6, 3)}, r"z must be \(B, T, D\)"),
        ({"a": torch.zeros(3, 5)}, r"a must be \(D, N\) with D = 6, it is \(3, 5\)"),
        ({"b": torch.zeros(1, 6, 4)}, r"b and c must be \(B, T, N\) = \(1, 6, 5\)"),
        ({"d": torch.zeros(5)}, r"d must be \(D,\) = \(6,\), it is \(5,\)"),
        ({"dt_bias": torch.zeros(5)}, r"dt_bias must be \(D,\)"),
        ({"initial_state": torch.zeros(2, 6, 5)}, r"initial_state must be \(1, 6, 5\)"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        ({"form": "fast"}, "form='fast' does not exist"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**make_inputs(6), **change})


def test_a_step_of_wrong_shapes() -> None:
    state, x, b = torch.zeros(2, 6, 5), torch.zeros(2, 6), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"state must be \(B, D, N\)"):
        selective_scan_step(state[:1], x, x, torch.zeros(6, 5), b, b)
