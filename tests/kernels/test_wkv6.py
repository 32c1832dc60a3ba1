"""WKV of RWKV-6: every form against the recurrence, both directions, states, packing, errors."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from triptych.kernels import wkv6

FP32_FLOOR = 2e-6  # a sum of some hundred fp32 terms
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
FORMS = ["torch", "triton"]

full = partial(wkv6, return_final_state=True)
both = partial(wkv6, bidirectional=True)


def make_inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 1,
    dim: int = 3,
    value_dim: int = 5,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of the operator, with an initial state for each of `states` documents (0: none at all)."""
    wide = torch.promote_types(dtype, torch.float32)
    tokens = (batch, length, heads)
    inputs = {
        "r": torch.randn(*tokens, dim, dtype=dtype),
        "k": torch.randn(*tokens, dim, dtype=dtype),
        "v": torch.randn(*tokens, value_dim, dtype=dtype),
        "w": -strength * torch.rand(*tokens, dim, dtype=wide),
        "u": torch.randn(heads, dim, dtype=dtype),
    }
    if states != 0:
        inputs["initial_state"] = torch.randn(states or batch, heads, dim, value_dim, dtype=wide)
    return inputs


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def test_the_recurrence_of_the_paper() -> None:
    """A sum over pairs: the decays of the tokens between i and t if i < t, u if i = t (arXiv 2404.05892)."""
    inputs = make_inputs(7, states=0)
    r, k, v, w = (inputs[name][0, :, 0] for name in "rkvw")
    expected = torch.zeros_like(v)
    backwards = torch.zeros_like(v)
    for t, i in itertools.product(range(7), range(7)):
        between = w[min(t, i) + 1 : max(t, i)].sum(0).exp()
        weight = (r[t] * (inputs["u"][0] if t == i else between) * k[i]).sum()
        (expected if i <= t else backwards)[t] += weight * v[i]
    for form in ("reference", *FORMS):
        one = wkv6(**inputs, form=form)[0, :, 0]
        two = both(**inputs, form=form)[0, :, 0]
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(two, expected + backwards, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "form"), [*((n, "torch") for n in (1, 63, 64, 65, 500)), (1, "triton"), (65, "triton")]
)
def test_agrees_with_the_recurrence(length: int, form: str, agree: Callable[..., None]) -> None:
    agree(partial(full, form=form), partial(full, form="reference"), make_inputs(length))


@pytest.mark.parametrize(("length", "form"), [(2, "torch"), (65, "torch"), (300, "torch"), (18, "triton")])
def test_both_directions(length: int, form: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(length, batch=2 if length < 300 else 1, states=0)
    agree(partial(both, chunk_size=16, form=form), partial(both, form="reference"), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_both_directions_are_the_same_turned_round(form: str) -> None:
    inputs = make_inputs(20, states=0)
    turned = {name: x if name == "u" else x.flip(1) for name, x in inputs.items()}
    y = both(**inputs, form=form)
    torch.testing.assert_close(both(**turned, form=form).flip(1), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [0.0, 20.0, 1000.0])
def test_decays_from_none_to_extreme(strength: float, form: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(40)
    inputs["w"] = torch.full_like(inputs["w"], -strength)
    agree(partial(full, chunk_size=32, form=form), partial(full, form="reference"), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_decay_of_zero_forgets_all(form: str) -> None:
    inputs = make_inputs(20)
    inputs["w"][:, 11] = -math.inf
    y = wkv6(**inputs, form=form)
    # The token reads before it forgets; all behind it see that token first.
    tail = {name: x[:, 12:] for name, x in inputs.items() if name in "rkvw"}
    state = inputs["k"][:, 11, :, :, None] * inputs["v"][:, 11, :, None, :]
    expected = wkv6(**tail, u=inputs["u"], initial_state=state, form="reference")
    torch.testing.assert_close(y[:, 12:], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y[:, 11], wkv6(**{**inputs, "initial_state": None}, form=form)[:, 11])


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_are_separate_runs(form: str, agree: Callable[..., None]) -> None:
    bounds = (0, 1, 18, 25, 50)

    def separately(initial_state: Tensor, u: Tensor, **tokens: Tensor) -> Any:
        parts = []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            document = {k: x.flatten(0, 1)[None, start:end] for k, x in tokens.items()}
            parts.append(full(**document, u=u, initial_state=initial_state[i : i + 1]))
        ys, finals = zip(*parts)
        return torch.cat(ys, 1).view(tokens["v"].shape), torch.cat(finals)

    inputs = make_inputs(25, batch=2, states=4)
    agree(partial(full, cu_seqlens=cuts(*bounds), chunk_size=16, form=form), separately, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_without_states(bidirectional: bool, form: str, agree: Callable[..., None]) -> None:
    packed = partial(wkv6, cu_seqlens=cuts(0, 3, 20, 40), bidirectional=bidirectional)
    inputs = make_inputs(20, batch=2, states=0)
    agree(partial(packed, chunk_size=16, form=form), partial(packed, form="reference"), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_states_hand_over(form: str, agree: Callable[..., None]) -> None:
    def in_two(initial_state: Tensor, u: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        head, tail = ({k: x[:, part] for k, x in tokens.items()} for part in (slice(17), slice(17, None)))
        first, state = full(**head, u=u, initial_state=initial_state, form=form)
        second, state = full(**tail, u=u, initial_state=state, form=form)
        return torch.cat([first, second], 1), state

    agree(in_two, full, make_inputs(30))


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_and_scale(form: str, agree: Callable[..., None]) -> None:
    def strided(r: Tensor, u: Tensor, **rest: Tensor) -> Any:
        r = r.transpose(1, 2).contiguous().transpose(1, 2) * 0.5
        return full(r=r, u=torch.stack([u, u], -1)[..., 0], scale=2.0, form=form, **rest)

    agree(strided, partial(full, form="reference"), make_inputs(20, heads=2))


def test_chunk_size_does_not_matter(agree: Callable[..., None]) -> None:
    for chunk_size in (1, 4, 128):
        agree(partial(full, chunk_size=chunk_size), full, make_inputs(70, heads=2))


@pytest.mark.parametrize("form", FORMS)
def test_low_precision(form: str, accurate: Callable[..., None]) -> None:
    for dtype, floor in ((torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)):
        inputs = make_inputs(70, dim=16, value_dim=16, dtype=dtype)
        accurate(partial(full, form=form), partial(full, form="reference"), inputs, floor)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_numerical_gradients(bidirectional: bool) -> None:
    inputs = make_inputs(5, dim=2, value_dim=2, states=0)
    names = list(inputs)

    def function(*values: Tensor) -> Tensor:
        return wkv6(**dict(zip(names, values)), bidirectional=bidirectional, chunk_size=2)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def test_the_adapter_fits_the_signature_of_fla(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("fla.ops.rwkv6", reason="fla is not importable here")
    signature = inspect.signature(package.chunk_rwkv6)

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        bound = signature.bind(*args, **kwargs).arguments
        assert "kwargs" not in bound, "nothing that the package would swallow unread"
        assert bound["r"].shape == (1, 12, 1, 3)
        return bound["v"], bound["initial_state"]

    monkeypatch.setattr(package, "chunk_rwkv6", record)
    from triptych.kernels.wkv6.external import wkv6 as adapter

    inputs = make_inputs(6, batch=2, dtype=torch.float32, states=3)
    options = {"scale": 1.0, "return_final_state": True, "chunk_size": 64, "bidirectional": False}
    y, _ = adapter(**inputs, **options, cu_seqlens=cuts(0, 2, 6, 12))
    assert y.shape == inputs["v"].shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 6, 1, 4)}, r"wkv6: r and k must both be \(B, T, H, D\)"),
        ({"v": torch.zeros(1, 5, 1, 5)}, r"v must be \(B, T, H, E\)"),
        ({"w": torch.zeros(1, 6, 1)}, r"w must be \(B, T, H, D\) = \(1, 6, 1, 3\), it is \(1, 6, 1\)"),
        ({"u": torch.zeros(3)}, r"u must be \(H, D\) = \(1, 3\), it is \(3,\)"),
        ({"initial_state": torch.zeros(2, 1, 3, 5)}, r"initial_state must be \(1, 1, 3, 5\)"),
        ({"bidirectional": True}, "a state goes one way only"),
        ({"chunk_size": 3}, "chunk_size=3 must be a power of two"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        ({"form": "fast"}, "form='fast' does not exist"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wkv6(**{**make_inputs(6), **change})


def test_fla_goes_one_way() -> None:
    from triptych.kernels.wkv6 import _supported_by_fla

    inputs = make_inputs(6, dim=4, value_dim=4, dtype=torch.float32, states=0)
    options = {"bidirectional": True, "cu_seqlens": None}
    assert _supported_by_fla(*inputs.values(), **options) == "it goes one way only"
    assert _supported_by_fla(*inputs.values(), **{**options, "bidirectional": False}) is None
