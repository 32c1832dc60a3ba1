"""SSD: the chunked forms against the recurrence, options, states, packing, FLOPs, registration, errors."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych import kernels
from triptych.kernels import ssd, ssd_step
from triptych.kernels.ssd import scan
from triptych.kernels.ssd.limits import mamba_ssm_lacks
from triptych.kernels.ssd.torch import ssd_backward_op, ssd_op

FP32_FLOOR = 2e-6  # a sum of some hundred fp32 terms
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8


def make_inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 4,
    head_dim: int = 3,
    groups: int = 2,
    state: int = 5,
    decay: float = 1.0,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of `ssd`, with an initial state for each of `states` documents (default: each row)."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(batch, length, heads, head_dim, dtype=dtype),
        "dt": torch.rand(batch, length, heads, dtype=wide),
        "a": -decay * torch.rand(heads, dtype=wide),
        "b": torch.randn(batch, length, groups, state, dtype=dtype),
        "c": torch.randn(batch, length, groups, state, dtype=dtype),
        "d": torch.randn(heads, dtype=wide),
        "initial_state": torch.randn(states or batch, heads, head_dim, state, dtype=wide),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


full = partial(ssd, return_final_state=True)


def with_options(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` with raw step sizes around 0, their bias, a gate and angles (an even state size has them)."""
    x, b = inputs["x"], inputs["b"]
    dtype = inputs["dt"].dtype
    options = {
        "dt": torch.randn(x.shape[:3], dtype=dtype),
        "dt_bias": torch.randn(x.shape[2], dtype=dtype),
        "z": torch.randn(x.shape, dtype=x.dtype),
    }
    if b.shape[3] % 2 == 0:
        options["angles"] = 3 * torch.randn(*b.shape[:3], b.shape[3] // 2, dtype=dtype)
    return inputs | options


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_agrees_with_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(full, partial(full, form="reference"), make_inputs(length))


@pytest.mark.parametrize(("groups", "heads", "head_dim", "state"), [(1, 3, 7, 1), (3, 3, 1, 9), (2, 6, 5, 4)])
def test_odd_sizes_and_groups(
    groups: int, heads: int, head_dim: int, state: int, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(77, batch=3, groups=groups, heads=heads, head_dim=head_dim, state=state)
    agree(partial(full, chunk_size=16), partial(full, form="reference"), inputs)


@pytest.mark.parametrize("decay", [0.0, 1e-4, 30.0, 1e3, 1e6])
def test_decays_from_none_to_extreme(decay: float, agree: Callable[..., None]) -> None:
    agree(full, partial(full, form="reference"), make_inputs(130, decay=decay), tolerance=1e-11)


def test_one_extreme_step_among_mild_ones(agree: Callable[..., None]) -> None:
    inputs = make_inputs(130)
    inputs["dt"][:, 40] = 1e5
    inputs["dt"][:, 70:75] = 0.0
    # The cumulative sum holds 1e5 here, so a difference of two is exact to 1e5 * 2^-53 only.
    agree(full, partial(full, form="reference"), inputs, tolerance=1e-9)


def test_strided_inputs(agree: Callable[..., None]) -> None:
    def strided(x: Tensor, dt: Tensor, **rest: Tensor) -> Any:
        return full(x=x.transpose(1, 2).contiguous().transpose(1, 2), dt=dt.mT.contiguous().mT, **rest)

    agree(strided, full, make_inputs(64, batch=2))
    agree(strided, full, make_inputs(70, batch=2))


@pytest.mark.parametrize("omitted", ["d", "initial_state"])
def test_optional_inputs(omitted: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(70)
    del inputs[omitted]
    agree(full, partial(full, form="reference"), inputs)


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_gradients(which: int, agree: Callable[..., None]) -> None:
    def only(form: str) -> Callable[..., Tensor]:
        # The final state does not depend on c and d, which then get zeros.
        return lambda c, d, **rest: full(c=c, d=d, form=form, **rest)[which] + 0 * (c.sum() + d.sum())

    agree(only("torch"), only("reference"), make_inputs(70))


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 256])
def test_chunk_size_does_not_matter(chunk_size: int, agree: Callable[..., None]) -> None:
    agree(partial(full, chunk_size=chunk_size), full, make_inputs(150, batch=2))


@pytest.mark.parametrize("bounds", [(0, 100, 200), (0, 1, 2, 64, 100, 131, 200), (0, 63, 100, 164, 165, 200)])
def test_packed_documents_are_separate_runs(bounds: tuple[int, ...], agree: Callable[..., None]) -> None:
    inputs = make_inputs(100, batch=2, states=len(bounds) - 1)

    def separately(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, initial_state: Tensor, **rest: Any) -> Any:
        ys, finals = [], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            x_, dt_, b_, c_ = (v.flatten(0, 1)[None, start:end] for v in (x, dt, b, c))
            y, final = full(x=x_, dt=dt_, b=b_, c=c_, initial_state=initial_state[i : i + 1], **rest)
            ys.append(y[0])
            finals.append(final[0])
        return torch.cat(ys).view(x.shape), torch.stack(finals)

    agree(partial(full, cu_seqlens=cuts(*bounds)), separately, inputs)


def test_packed_without_states(agree: Callable[..., None]) -> None:
    inputs = make_inputs(150, batch=2)
    del inputs["initial_state"]
    packed = partial(ssd, cu_seqlens=cuts(0, 3, 64, 128, 129, 150, 222, 300))
    agree(packed, partial(packed, form="reference"), inputs)


def test_nothing_leaks_into_the_next_document() -> None:
    inputs = make_inputs(100)
    del inputs["initial_state"]
    packed = partial(ssd, cu_seqlens=cuts(0, 70, 100))
    before = packed(**inputs)
    inputs["x"][:, :70] = 1e30
    torch.testing.assert_close(packed(**inputs)[:, 70:], before[:, 70:], rtol=0, atol=0)


def test_states_hand_over(agree: Callable[..., None]) -> None:
    def in_two(initial_state: Tensor, a: Tensor, d: Tensor, **by_token: Tensor) -> tuple[Tensor, Tensor]:
        head = {k: v[:, :70] for k, v in by_token.items()}
        tail = {k: v[:, 70:] for k, v in by_token.items()}
        first, state = full(**head, a=a, d=d, initial_state=initial_state)
        second, state = full(**tail, a=a, d=d, initial_state=state)
        return torch.cat([first, second], 1), state

    agree(in_two, full, make_inputs(111, batch=2))


@pytest.mark.parametrize("options", [False, True])
def test_steps_give_the_same(options: bool) -> None:
    inputs = make_inputs(20, batch=2, state=4)
    inputs = with_options(inputs) if options else inputs
    settings = {"dt_softplus": True, "dt_limit": (0.2, 2.0)} if options else {}
    y, final_state = full(**inputs, **settings)
    state = inputs.pop("initial_state")
    per_head = {k: inputs.pop(k) for k in ("a", "d", "dt_bias") if k in inputs}
    for t in range(20):
        y_t, state = ssd_step(state, **{k: v[:, t] for k, v in inputs.items()}, **per_head, **settings)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


raw = partial(full, dt_softplus=True, dt_limit=(0.2, 2.0))


def test_options_agree_with_the_recurrence(agree: Callable[..., None]) -> None:
    inputs = with_options(make_inputs(130, batch=2, state=6))
    inputs["dt"][:, ::7] += 30.0  # where softplus is the identity
    agree(raw, partial(raw, form="reference"), inputs)
    agree(
        partial(raw, dt_limit=(0.0, float("inf"))), partial(full, form="reference", dt_softplus=True), inputs
    )


@pytest.mark.parametrize("option", ["z", "dt_bias", "angles"])
def test_each_option_alone(option: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(20, state=4)
    inputs |= {option: with_options(inputs)[option].abs()}
    agree(full, partial(full, form="reference"), inputs)


def test_options_are_what_they_say() -> None:
    inputs = make_inputs(30, state=4)
    options = with_options(inputs)
    dt = torch.nn.functional.softplus(options["dt"] + options["dt_bias"], threshold=40).clamp(0.2, 2.0)
    b, c = (kernels.rotary(inputs[k], torch.arange(30), theta=1.0) for k in ("b", "c"))
    angles = torch.arange(30.0, dtype=dt.dtype)[None, :, None, None].expand(1, 30, 2, 2)
    found, state = raw(**options | {"angles": angles})
    y, expected_state = full(**inputs | {"dt": dt, "b": b, "c": c})
    torch.testing.assert_close(found, y * torch.nn.functional.silu(options["z"]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(state, expected_state, rtol=1e-8, atol=1e-8)


def test_packed_options(agree: Callable[..., None]) -> None:
    inputs = with_options(make_inputs(100, batch=2, state=4, states=5))
    packed = partial(raw, cu_seqlens=cuts(0, 3, 70, 100, 164, 200))
    agree(packed, partial(packed, form="reference"), inputs)


# Initial states in, final states not asked for; and the other way round.
@pytest.mark.parametrize("given", ["initial_state", "final_state"])
def test_packed_with_one_of_the_states(given: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(100, batch=2, states=6)
    if given == "final_state":
        del inputs["initial_state"]
    packed = partial(ssd if given == "initial_state" else full, cu_seqlens=cuts(0, 20, 30, 64, 100, 170, 200))
    agree(packed, partial(packed, form="reference"), inputs)


triton = partial(raw, form="triton")
plain_triton = partial(full, form="triton")


def small(length: int, **sizes: Any) -> dict[str, Tensor]:
    """Inputs that the interpreter gets through: two heads of a group are looped over, two groups are not."""
    return make_inputs(length, **{"heads": 2, "groups": 1, "state": 4, **sizes})


@pytest.mark.parametrize("length", [1, 63, 65])
def test_triton_agrees_with_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(triton, partial(raw, form="reference"), with_options(small(length)))


def test_triton_in_many_chunks(agree: Callable[..., None]) -> None:
    agree(partial(plain_triton, chunk_size=16), partial(full, form="reference"), small(110))


@pytest.mark.parametrize(
    ("groups", "heads", "head_dim", "state"), [(1, 3, 17, 1), (2, 2, 1, 33), (1, 1, 65, 2)]
)
def test_triton_odd_sizes(
    groups: int, heads: int, head_dim: int, state: int, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(35, groups=groups, heads=heads, head_dim=head_dim, state=state)
    agree(partial(plain_triton, chunk_size=16), partial(full, form="reference"), inputs)


def test_triton_packed_documents(agree: Callable[..., None]) -> None:
    bounds = cuts(0, 1, 17, 40, 56, 80)
    inputs = with_options(small(40, batch=2, states=5))
    packed = {"cu_seqlens": bounds, "chunk_size": 16}
    agree(partial(triton, **packed), partial(raw, form="reference", **packed), inputs)


def test_triton_splits_heads_alike(monkeypatch: pytest.MonkeyPatch, agree: Callable[..., None]) -> None:
    module = importlib.import_module("triptych.kernels.ssd.triton")
    inputs = make_inputs(20, heads=6, groups=2)
    with monkeypatch.context() as patched:
        patched.setattr(module, "PROGRAMS", 4)  # two programs of two heads and of one, and not three of one
        agree(plain_triton, full, inputs)


@pytest.mark.parametrize("decay", [0.0, 20.0, 1e3])
def test_triton_decays_from_none_to_extreme(decay: float, agree: Callable[..., None]) -> None:
    agree(plain_triton, partial(full, form="reference"), small(40, decay=decay), tolerance=1e-11)


def test_triton_without_options_and_strided(agree: Callable[..., None]) -> None:
    def strided(x: Tensor, b: Tensor, dt: Tensor, **rest: Tensor) -> Tensor:
        wide = torch.cat([x, 2 * x], 3)[..., : x.shape[3]]
        return ssd(x=wide, b=b.mT.contiguous().mT, dt=dt.mT.contiguous().mT, form="triton", **rest)

    inputs = small(30, batch=2)
    for name in ("d", "initial_state"):
        del inputs[name]
    agree(strided, partial(ssd, form="reference"), inputs)


# Triton's interpreter truncates to bf16 where a GPU rounds.
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.float16, 1e-3)])
def test_triton_low_precision(dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    inputs = small(40, dtype=dtype, decay=3.0)
    form = partial(plain_triton, chunk_size=16)
    y, state = form(**inputs)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    accurate(form, partial(full, form="reference"), inputs, floor)


def test_triton_saves_its_inputs_only() -> None:
    inputs = {k: v.requires_grad_() for k, v in small(20).items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ssd(**inputs, form="triton")
    assert set(saved) <= {v.data_ptr() for v in inputs.values()}


def test_triton_registration() -> None:
    module = importlib.import_module("triptych.kernels.ssd.triton")
    *tensors, initial_state = (v.requires_grad_() for v in small(5, batch=2, states=3).values())
    rest = (None, initial_state, cuts(0, 3, 5, 10), True, 0.1, 3.0, 64)
    # Further utilities trace the op once more each, which takes its time under the interpreter.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module.ssd_op, (*tensors, *rest), test_utils=utilities)
    tensors, rest = [t.detach() for t in tensors], (None, initial_state.detach(), *rest[2:])
    y, final_state = module.ssd_op(*tensors, *rest)
    torch.library.opcheck(module.ssd_backward_op, (y, final_state, *tensors, *rest), test_utils=utilities)


def test_triton_finds_chunks_of_documents() -> None:
    module = importlib.import_module("triptych.kernels.ssd.triton")
    bounds = [0, 1, 16, 33, 60, 77, 120]
    found = module.cut(torch.zeros(2, 60, 1, 1), cuts(*bounds), 16)
    expected = [
        [first, min(first + 16, end)]
        for start, end in itertools.pairwise(bounds)
        for first in range(start, end, 16)
    ]
    whole = found.bounds[: len(expected)].tolist()
    assert whole == expected
    assert all(start == end for start, end in found.bounds[len(expected) :].tolist())
    assert found.firsts.tolist() == [0, 1, 2, 4, 6, 8, 11]


def test_triton_refuses_large_states() -> None:
    inputs = make_inputs(3, heads=1, groups=1, state=257)
    with pytest.raises(ValueError, match="state size 257 is above 256"):
        ssd(**inputs, form="triton")


def test_mamba_ssm_gets_the_call_in_its_words() -> None:
    external = importlib.import_module("triptych.kernels.ssd.external")
    inputs = with_options(make_inputs(6, batch=2, state=4, dtype=torch.float32))
    options = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "chunk_size": 64}
    found = external.arguments_of(**inputs, **options, cu_seqlens=cuts(0, 4, 6, 12))
    assert found["seq_idx"].tolist() == [[0, 0, 0, 0, 1, 1], [2] * 6]
    assert found["seq_idx"].dtype == torch.int32
    same = {
        "x": "x",
        "dt": "dt",
        "A": "a",
        "D": "d",
        "z": "z",
        "dt_bias": "dt_bias",
        "initial_states": "initial_state",
    }
    assert all(found[theirs] is inputs[ours] for theirs, ours in same.items())
    # Angles of b and c relative to each other are what counts.
    assert torch.allclose((found["B"] * found["B"]).sum(-1), (inputs["b"] * inputs["b"]).sum(-1), rtol=1e-5)
    assert not torch.allclose(found["B"], inputs["b"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(1, 6, 4, 3, dtype=torch.float64)}, "fp32 at most"),
        ({"cu_seqlens": cuts(0, 3, 6)}, "no initial states of packed documents"),
        ({"cu_seqlens": cuts(0, 3, 6), "initial_state": None, "with_final_state": True}, "have no gradients"),
        ({"x": torch.zeros(1, 1, 1, 1).expand(1, 70_000, 4, 3)}, "32-bit offsets are not safe for T=70000"),
        (
            {"x": torch.zeros(4000, 50_000, 4, 64, device="meta")},
            r"do not reach tensors of 2\^31 elements",
        ),
        ({}, None),
    ],
)
def test_what_mamba_ssm_cannot_do(change: dict[str, Any], reason: str | None) -> None:
    call = {"cu_seqlens": None, "with_final_state": False, **make_inputs(6, dtype=torch.float32), **change}
    found = mamba_ssm_lacks(**call)
    assert found is reason is None or re.search(str(reason), str(found))


@pytest.mark.parametrize("decay", [0.1, 10.0])
def test_fp32_accuracy(decay: float, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(300, decay=decay, dtype=torch.float32)
    accurate(full, partial(full, form="reference"), inputs, FP32_FLOOR)


def test_bf16_inputs(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(200, dtype=torch.bfloat16)
    y, state = full(**inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    accurate(full, partial(full, form="reference"), inputs, BF16_FLOOR)


def test_agrees_with_transformers() -> None:
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    scan_ = getattr(module, "mamba2_chunk_scan", None)
    if scan_ is None:
        pytest.skip("this transformers has no separate Mamba-2 scan")
    inputs = make_inputs(100, batch=2, dtype=torch.float32)
    del inputs["initial_state"]
    y, state = full(**inputs)
    # The name dispatches to a kernel of the hub; what it wraps is the plain PyTorch form.
    x, dt, a, b, c, d = inputs.values()
    plain = getattr(scan_, "__wrapped__", scan_)
    theirs = plain(x, dt, a, b, c, 32, D=d, return_final_states=True)
    torch.testing.assert_close(y, theirs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, theirs[1], rtol=1e-4, atol=1e-4)


def test_autocast_leaves_the_scan_alone(errors: Callable[..., dict[str, float]]) -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(**inputs)
    assert all(torch.equal(y, z) for y, z in zip(cast, full(**inputs)))


def test_numerical_gradients() -> None:
    inputs = make_inputs(5, heads=2, head_dim=2, groups=1, state=2)
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return full(**dict(zip(names, values)), chunk_size=2)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


def op_arguments(packed: bool) -> tuple[Any, ...]:
    inputs = make_inputs(9, batch=2, states=4 if packed else None)
    bounds = cuts(0, 2, 7, 9, 18) if packed else None
    return (*(v.requires_grad_() for v in inputs.values()), bounds, 4, True)


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    arguments = op_arguments(packed)
    torch.library.opcheck(ssd_op, arguments)
    detached = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    *inputs, bounds, size, with_states = detached
    y, final_state, states = ssd_op(*detached)
    torch.library.opcheck(ssd_backward_op, (y, final_state, *inputs, states, bounds, size, with_states))


def test_flop_formulas_count_the_matmuls_inside() -> None:
    arguments = [v.detach() if isinstance(v, Tensor) else v for v in op_arguments(packed=False)]
    *inputs, bounds, size, with_states = arguments
    y, final_state, states = ssd_op(*arguments)
    backward = (y, final_state, *inputs, states, bounds, size, with_states)
    for op, function, args in ((ssd_op, scan.forward, arguments), (ssd_backward_op, scan.backward, backward)):
        with FlopCounterMode(display=False) as registered:
            op(*args)
        with FlopCounterMode(display=False) as plain:
            function(*args)
        assert registered.get_total_flops() == plain.get_total_flops() > 0


def test_meta_tensors() -> None:
    inputs = {k: v.to("meta").requires_grad_() for k, v in make_inputs(100).items()}
    y, state = full(**inputs)
    assert y.shape == inputs["x"].shape
    assert state.shape == inputs["initial_state"].shape
    (y.sum() + state.sum()).backward()
    assert all(v.grad.shape == v.shape for v in inputs.values())


def test_saves_inputs_and_chunk_states_only() -> None:
    inputs = {k: v.requires_grad_() for k, v in make_inputs(128).items()}
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t)
    with hooks:
        y = ssd(**inputs)
    given = {v.data_ptr() for v in inputs.values()}
    assert y.data_ptr() not in saved
    assert len(set(saved) - given) == 1, "the states before each chunk, and nothing else"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 3)}, r"x must be \(B, T, H, P\)"),
        ({"dt": torch.zeros(1, 6, 3)}, r"dt must be \(B, T, H\) = \(1, 6, 4\)"),
        ({"a": torch.zeros(3)}, r"a must be \(H,\) = \(4,\), it is \(3,\)"),
        ({"b": torch.zeros(1, 6, 2, 4)}, r"b and c must be \(B, T, G, N\)"),
        ({"b": torch.zeros(1, 6, 3, 5), "c": torch.zeros(1, 6, 3, 5)}, "3 groups do not divide 4 heads"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, r"initial_state must be \(1, 4, 3, 5\)"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        ({"z": torch.zeros(1, 6, 4, 2)}, r"z must be shaped like x \(1, 6, 4, 3\), it is"),
        ({"dt_bias": torch.zeros(3)}, r"dt_bias must be \(H,\) = \(4,\), it is \(3,\)"),
        ({"dt_limit": (1.0, 1.0)}, r"dt_limit=\(1.0, 1.0\) is no range; use 0 <= low < high"),
        ({"angles": torch.zeros(1, 6, 2, 2)}, r"angles must be half as wide as b \(1, 6, 2, 5\), N even"),
        ({"form": "fast"}, r"form='fast' does not exist; use one of \['mamba_ssm', 'triton'"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**{**make_inputs(6), **change})
