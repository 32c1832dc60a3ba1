"""SSD: the chunked form against the recurrence, states, packing, FLOPs, registration, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import ssd, ssd_step
from triptych.kernels.ssd import scan
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


def test_steps_give_the_same() -> None:
    inputs = make_inputs(20, batch=2)
    y, final_state = full(**inputs)
    state = inputs["initial_state"]
    for t in range(20):
        x_t, dt_t, b_t, c_t = (inputs[k][:, t] for k in ("x", "dt", "b", "c"))
        y_t, state = ssd_step(state, x_t, dt_t, inputs["a"], b_t, c_t, inputs["d"])
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


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
    inputs = make_inputs(9, batch=2)
    segments = torch.arange(9, dtype=torch.int32).expand(2, 9) // 4 if packed else None
    return (*(v.requires_grad_() for v in inputs.values()), segments, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    arguments = op_arguments(packed)
    torch.library.opcheck(ssd_op, arguments)
    detached = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    *inputs, _, segments, size = detached
    y, final_state, states = ssd_op(*detached)
    torch.library.opcheck(ssd_backward_op, (y, final_state, *inputs, states, segments, size))


def test_flop_formulas_count_the_matmuls_inside() -> None:
    arguments = [v.detach() if isinstance(v, Tensor) else v for v in op_arguments(packed=False)]
    *inputs, _, segments, size = arguments
    y, final_state, states = ssd_op(*arguments)
    backward = (y, final_state, *inputs, states, segments, size)
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
        ({"form": "fast"}, r"form='fast' does not exist; use one of \['torch', 'reference'\]"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**{**make_inputs(6), **change})
